"""What `t5gemma.reproduce` measures: one module for each experiment.

config         sizes of every experiment, presets
bench          a donor and a text, and every model that is made of them, each trained once
scoring        the same held-out text, continued by encoder-decoders and by decoders
from_scratch   adapted against from scratch, at equal tokens
objectives     PrefixLM with distillation against UL2; encoders as readers
equal_flops    adapted against the donor continued, at equal inference FLOPs
unbalanced     a large encoder with a small decoder against balanced pairs
labelled       the classification task
claims         what the paper predicts of all this
report         tables and figures
"""
