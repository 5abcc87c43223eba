"""What happens on the driver: functions are handed over, and the book is kept."""
