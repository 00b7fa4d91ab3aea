# Solutions of the exercises in 0_start/01_moco.ipynb; each part replaces the line with `...` of its cell.

# %% 1
import math
loss_of_guessing = math.log(1 + 32_768)

# %% 2
steps_here = 512//32
steps_in_paper = math.ceil(32_768/(3*256))

# %% 3
momentum = 0
