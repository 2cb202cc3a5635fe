"""What any training program needs. Nothing here knows of RLHF, or imports the course."""
