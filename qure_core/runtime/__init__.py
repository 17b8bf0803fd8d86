"""Running a command on a Ray cluster: arguments, resources, progress and what is shown."""
