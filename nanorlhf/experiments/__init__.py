"""Programs about the course: many runs compared, claims run again, and how fast it is."""
