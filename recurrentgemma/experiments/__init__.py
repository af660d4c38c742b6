"""What `recurrentgemma.reproduce` measures: one module for each experiment.

contenders     Griffin, Hawk and a full-attention decoder of equal size
config         sizes of every experiment, presets
memory         bytes of the decode state by context
speed          decode and prefill time by context
language       held-out loss at and beyond the training length
induction      recall of a token seen once, at and beyond the training length
claims         what the papers predict of all this
"""
