"""From a dataset and initial weights to a trained checkpoint (notebooks 07 and 10)."""
