"""What the scripts stand on, and a reader of the method can skip. Nothing here imports from above."""
