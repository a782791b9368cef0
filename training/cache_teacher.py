"""``python -m training.cache_teacher``: compute the teachers' embeddings once."""

from training.clip.cache_teacher import main
from training.errors import cli

if __name__ == "__main__":
    cli(main)
