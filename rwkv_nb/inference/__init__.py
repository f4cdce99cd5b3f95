"""From logits to text (notebooks 08 and 09)."""
