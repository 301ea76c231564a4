"""Every table of the trainer and the losses: `python -m tests.benchmarks`, about ten minutes."""

from tests.benchmarks import losses, training

losses.main()
training.main()
