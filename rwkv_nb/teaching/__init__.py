"""What every notebook uses: figures, widgets, checks of exercises, the self-check. Imports from every other room."""
