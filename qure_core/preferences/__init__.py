"""People's choices between two results: kept, counted, and what they say."""
