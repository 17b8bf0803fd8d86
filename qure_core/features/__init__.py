"""The feature store: each image's frozen vision features, computed once and read by memory map."""
