"""The embedded default: real handwriting, a teacher, a bank and three students in ten minutes."""
