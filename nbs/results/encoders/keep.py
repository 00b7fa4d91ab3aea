"""Keep the last network of runs in half precision, for the notebooks that start from it.

    python nbs/results/encoders/keep.py RUN [RUN ...]

RUN is a finished folder of `c2l_pretrain`. The file beside this one has the run's name, torchvision's key names and the run's card, with sources and limits added.
"""
import argparse
from pathlib import Path
import torch
from c2l_nb.training.weights import export_backbone, load_backbone, read_card

here = Path(__file__).parent
SOURCE = ("train split of 3,278 chest radiographs without their labels: Kermany et al. 2018 (children of 1 to 5 years, CC BY 4.0) and a sample of "
          "ChestX-ray14, Wang et al. 2017")
LIMITS = ("48 px, few images, one seed: notebook 70 has what it gives on other patients, with intervals; half precision rounds features by about 1e-3")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path)
    for run in parser.parse_args().runs:
        path = run/'backbone.safetensors'
        card = read_card(path) | dict(source=SOURCE, limits=LIMITS)
        print(export_backbone(load_backbone(path), here/f'{run.name}.safetensors', card, torch.float16))

if __name__ == '__main__': main()
