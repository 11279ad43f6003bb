"""Sphinx: the look of the site and what it may load. Its pages are gathered by make.py, so nothing is run here."""
import configparser, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE)) # for the rule of the anchors
settings = configparser.ConfigParser(delimiters=['='])
settings.read(HERE.parent/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project, author, copyright = 'PixArt-δ from first principles', settings['author'], settings['copyright']
release = settings['version']
extensions = ['myst_nb']
root_doc = 'index'
exclude_patterns = ['files/**']
nb_execution_mode = 'off'
nb_merge_streams, nb_render_markdown_format = True, 'myst'
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_block', 'fieldlist']
myst_heading_anchors = 4
myst_heading_slug_func = 'chapters.jupyter_anchor'
myst_links_external_new_tab = False
toc_object_entries_show_parents = 'hide'
add_module_names = False
pygments_style, pygments_dark_style = 'a11y-high-contrast-light', 'a11y-high-contrast-dark'

html_theme = 'sphinx_book_theme'
html_title = 'PixArt-δ'
html_static_path = [str(HERE/'_static')]
html_css_files, html_js_files, html_favicon = ['course.css'], ['course.js'], str(HERE/'_static/favicon.svg')
html_show_sourcelink = html_copy_source = False
html_context = {'default_mode': 'auto'}
html_theme_options = {
    'navbar_start': [], 'navbar_center': [], 'navbar_end': [], 'navbar_persistent': [],
    'show_navbar_depth': 1, 'collapse_navbar': True, 'use_download_button': False, 'use_fullscreen_button': False,
    'pygments_light_style': 'a11y-high-contrast-light', 'pygments_dark_style': 'a11y-high-contrast-dark',
    'show_toc_level': 2, 'home_page_in_toc': True, 'navigation_with_keys': False,
}
mathjax_path = 'mathjax/tex-svg-full.js'
mathjax3_config = {'tex': {'tags': 'none'}, 'svg': {'fontCache': 'global'}, 'options': {'enableMenu': False}}
suppress_warnings = ['myst.header', 'misc.highlighting_failure', 'mystnb.unknown_mime_type', 'toc.not_included']
