"""Training over several processes, on a mesh of data x heads; docs/distributed.md has the traffic of each step.

``torchrun --nproc-per-node 4 -m kronsae train ... --head-parallel 2`` starts four processes: two shares of the tokens
of every batch, times two parts of every dictionary.

- `team`: the processes, and where each stands in the mesh;
- `stream`: all compute the order of the text and of the activations; each runs the model on a part of the windows, and
  trains on the rows of a batch that it computed. The batches are those of one process;
- `shares`: statistics over the shares of a batch, for `kronsae.core.shares`; `gradients` sums those of the weights;
- `heads`: the own part of a dictionary, for `kronsae.training.split`. Each process offers the k best of its latents;
  the k best of the union are exact;
- `checkpoint`: checkpoints of `torch.distributed.checkpoint`, as safetensors and JSON, which any number of processes
  resumes;
- `launch`: start and end of the processes, and one message where one of them fails.

Core, kernels and the training loop know nothing of this: core asks `kronsae.core.shares.shares` for what is taken over
the tokens of a batch, and a `Member` its `kronsae.training.split.Split` for what is taken over the latents.
"""
