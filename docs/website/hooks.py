"""What mkdocs.yml cannot say: pages from outside of docs/, pages that are made, links between them, a check.

mkdocs calls the functions named on_*, in the order in which they stand here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api
import gallery
import offline
import pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

SOURCE = '<details class="mkdocstrings-source"'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the API reference into the navigation, below the entry with its title."""
    (section,) = (entry for entry in config.nav or [] if api.TITLE in entry)
    section[api.TITLE] = api.navigation(pages.ROOT)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add pages that are made here or lie outside docs/, and the files that pages link to or show.

    Raises:
        PluginError: If a page links to nothing, or a module has no docstring.
    """
    try:
        made = api.pages(pages.ROOT) | {gallery.PAGE: gallery.page(pages.ROOT)}
        wanted = set(gallery.images(pages.ROOT)).union(*(pages.goals(path) for path in pages.own()))
    except ValueError as error:
        raise PluginError(str(error)) from None
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for path in wanted.union(pages.own()):
        uri, source = pages.uri(path), pages.ROOT / path
        if not source.exists():  # the list of a folder
            text = pages.listing(Path(path).parent.as_posix())
            files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
        elif files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site.

    Args:
        markdown: The page's text.
        page: Which page it is.
        config: As mkdocs passes it; not used.
        files: As mkdocs passes it; not used.

    Returns:
        The text that mkdocs renders.
    """
    source = pages.path(page.file.src_uri)
    return pages.relinked(markdown, source) if (pages.ROOT / source).exists() else markdown


def on_page_content(html: str, **kwargs: Any) -> str:
    """Keep source code out of the search index: search finds what is said about a function."""
    return html.replace(SOURCE, f"{SOURCE} data-search-exclude")


def on_post_build(*, config: MkDocsConfig, **kwargs: Any) -> None:
    """Refuse a site that loads anything from elsewhere.

    Raises:
        PluginError: If it does; the message names the pages.
    """
    found = offline.loads(Path(config.site_dir))
    if found:
        raise PluginError("the site loads from the network: " + "; ".join(found))
