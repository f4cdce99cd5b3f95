"""From text to the tokens that the trainer reads (notebooks 01 to 03)."""
