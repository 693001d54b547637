"""Published results on this code: a sweep per file, with the numbers that it should give."""
