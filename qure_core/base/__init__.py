"""What every room uses: errors, seeds and the schema of the settings."""
