"""What a written dataset holds, in numbers, and whether every sample of it can be used."""
