"""The data side, in numpy and PIL: nothing here imports jax, torch or TensorFlow.

images     files, bytes or PIL images -> patches
video      frames or a file -> patches and timestamps
chat       messages -> token ids and loss mask
positions  MRoPE, patch coordinates, corners of the learned position table
processor  samples -> `Encoded`, `Batch`
packing    `Encoded` -> rows of a `Batch`
batch      `Batch`
"""
