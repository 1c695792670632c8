"""What a run tells people: lines, plans, previews, a picture. It reads what others found, and decides nothing."""
