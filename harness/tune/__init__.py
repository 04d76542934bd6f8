"""Search engines and their knobs for the fastest way to make a planned run on one machine. Start reading at search.py."""
