"""Running a plan chunk by chunk in bounded memory."""
