"""What most users need: `from c2l_nb.all import *`, after `from fastai.vision.all import *`.

A list made by hand, not from a notebook; none of its names is one of fastai's.
"""
from .core import patient_ids
from .data.phantom import phantom, phantom_batch, write_phantoms
from .data.read import read_radiograph
from .data.table import folder, index_csv
from .data.collections import RadiographBlock, chestxray14, chexpert, medmnist, mimic_cxr, mura, rsna_pneumonia
from .data.leakage import audit_leaks
from .data.cache import RadiographCache, build_cache, labelled_dls, pretrain_dls
from .method.encoder import Prepare, create_encoder
from .method.augment import C2LAugment
from .method.model import C2L, C2LConfig, config_diff
from .evaluation.metrics import auroc_table, paired_difference
from .evaluation.features import extract_features, knn_predict, linear_probe, plot_umap, retrieval_at_1
from .evaluation.attribution import grad_cam
from .training.callback import C2LCallback, C2LLoss, CosineDecay, StepDecay, c2l_opt, show_pairs
from .training.monitoring import CollapseGuard, HealthCallback, OnlineProbe, plot_health
from .training.weights import export_backbone, load_backbone, read_card
from .training.checkpoint import C2LCheckpoint, resume
from .training.distributed import distributed
from .tasks.pretrain import pretrain

__all__ = [name for name in dir() if not name.startswith('_')]
