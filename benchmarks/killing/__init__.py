"""What benchmarks/kills.py kills against: a slow hub, and a small world to set up."""
