"""Rules: which images below the target are hard negatives."""
