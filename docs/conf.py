"""Configuration of the documentation site; `make docs` builds it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project, author, copyright = "DDIL", "The DDIL maintainers", "2026, the DDIL maintainers. Apache-2.0"
html_title = "DDIL"
extensions = [
    *("myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"),
    *("sphinx.ext.mathjax", "sphinx-mathjax-offline"),  # the site shows equations without a network
    *("docstrings", "directives", "accessible"),  # in _ext
]
exclude_patterns = ["_build", "_ext", "README.md"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files, html_js_files = ["site.css"], [("site.js", {"defer": "defer"})]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_theme_options = {"sidebar_hide_name": False}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # what a notebook writes is of no use here
nb_output_stderr = "remove"  # progress bars

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
default_role = "code"
copybutton_exclude = ".linenos, .gp, .go"

# Every reference to a name of the library leads to it; other libraries' inventories would need a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|gymnasium|numpy|pathlib|stable_baselines3|tensordict|torch|torchrl)\..*"),
    ("py:class", r"(nn\.)?Module|Path|Tensor|TensorDict|ActType|AutoresetMode|optional \w+"),  # the latter in docstrings of gymnasium
    ("py:class", r"ddil_env\.denoiser\.Network"),  # a type variable
    ("py:attr", r"action_space|metadata|np_random_seed|observation_space|render_mode"),
]
nb_merge_streams = True  # what a cell prints is one block
