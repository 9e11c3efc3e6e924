"""The paper's analyses: dilution of visual attention, logit lens, and where each token looks."""
