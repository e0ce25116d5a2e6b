"Build the package from settings.ini, where the project's facts stand."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]

setup(
    name=facts["lib_name"], version=facts["version"], description=facts["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=facts["author"], keywords=facts["keywords"].split(), license="Apache-2.0", license_files=["LICENSE"],
    packages=find_packages(include=[facts["lib_name"] + "*"]),
    package_data={facts["lib_name"]: ["weights/**", "tables/*.json"]}, include_package_data=False,
    python_requires=">=" + facts["min_python"], install_requires=facts["requirements"].split(),
    extras_require={extra: facts[f"{extra}_requirements"].split() for extra in ("course", "dev")},
    entry_points={"console_scripts": facts["console_scripts"].split()},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    zip_safe=False,
)
