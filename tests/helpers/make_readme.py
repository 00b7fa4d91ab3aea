"""README.md from nbs/index.ipynb: python tests/helpers/make_readme.py [FOLDER]

The links of the notebook are relative to nbs/, those of README to the root. A cell that begins with `#| hide` is left
out; of one that begins with `#| echo: false` only the output is shown.
"""
import re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor, RegexRemovePreprocessor

ROOT = Path(__file__).resolve().parents[2]

class OutputAlone(Preprocessor):
    "Leaves the code of `#| echo: false` cells out"
    def preprocess_cell(self, cell, resources, index):
        if cell.source.startswith('#| echo: false'):
            cell.metadata.transient = dict(remove_source=True)
        return cell, resources

def readme():
    "The text of README.md"
    hidden = RegexRemovePreprocessor(enabled=True, patterns=[r'#\| hide'])
    exporter = MarkdownExporter()
    exporter.register_preprocessor(hidden, enabled=True)
    exporter.register_preprocessor(OutputAlone(), enabled=True)
    text, _ = exporter.from_filename(str(ROOT/'nbs'/'index.ipynb'))
    text = re.sub(r'\]\((?=[\w/]+\.ipynb\)|images/)', '](nbs/', text)
    return text.replace('](../', '](')

if __name__ == '__main__':
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    (folder/'README.md').write_text(readme(), encoding='utf-8')
