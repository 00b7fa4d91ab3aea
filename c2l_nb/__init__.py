__version__ = "0.2.0"

import os, sys, warnings

# fastai compiles functions by torch.jit.script while it is imported, and torch warns of that:
# whoever typed a command cannot change it. Where other programs import the package, nothing is touched.
_program = ''.join(sys.argv[:1])                              # '-m' while `python -m c2l_nb.tasks.pretrain` is being found
if _program == '-m' or os.path.basename(_program).startswith('c2l_'):
    warnings.filterwarnings('ignore', r'`torch\.jit\.script` is', FutureWarning)
