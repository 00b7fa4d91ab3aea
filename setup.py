"The package as settings.ini describes it."
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=split(cfg['keywords']),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Medical Science Apps.'],
    packages=find_packages(include=['c2l_nb', 'c2l_nb.*']), package_data={'c2l_nb': ['py.typed']}, python_requires=f">={cfg['min_python']}",
    install_requires=split(cfg['requirements']),
    extras_require={name: split(cfg[f'{name}_requirements']) for name in ('detect', 'dist', 'timm', 'imagenet', 'dev')},
    entry_points={'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
                  'console_scripts': split(cfg['console_scripts'])},
    zip_safe=False)
