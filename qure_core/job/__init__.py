"""The main job: a run directory, what is in it, and how it goes on."""
