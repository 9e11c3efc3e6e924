"""The paper's analyses of a checkpoint's answers.

texts      what is analysed: given answers, or long ones that the model writes
tracing    texts through a model: `trace` is the entry
walk       how: window by window through the model's own layers
dilution   attention left for the image, and its power law; PVM's entropy and share
logit_lens what each layer would say
retrieval  where tokens look, in pixels
results    the values that all of this ends in
"""
