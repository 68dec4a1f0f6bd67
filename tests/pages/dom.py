"""What tests read of a page: numbers, texts, contrasts."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from tools.browser import Page

Numbers = npt.NDArray[np.float64]


def numbers(page: Page, selector: str) -> Numbers:
    """The exact numbers that elements carry, in the order of the page."""
    texts = page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.dataset.value)")
    assert isinstance(texts, list)
    assert texts, selector
    return np.asarray([{"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}.get(t) or float(t) for t in texts])


def texts(page: Page, selector: str) -> list[str]:
    """The texts of elements, in the order of the page."""
    found = page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    assert isinstance(found, list)
    return [str(text) for text in found]


def contrasts(page: Page) -> list[tuple[float, str]]:
    """(contrast, text) of every text on the page against what is behind it, by the formula of WCAG 2."""
    found = page.value(
        """(() => {
          const luminance = (c) => {
            const [r, g, b] = c.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const parsed = (text) => text.match(/[\\d.]+/g).map(Number);
          const behind = (e) => {
            for (; e; e = e.parentElement) {
              const c = parsed(getComputedStyle(e).backgroundColor);
              if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
            }
            return [255, 255, 255];
          };
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          const found = [];
          while (walker.nextNode()) {
            const e = walker.currentNode.parentElement;
            if (!walker.currentNode.textContent.trim() || !e.checkVisibility()) continue;
            if (["SCRIPT", "NOSCRIPT", "OPTION"].includes(e.tagName)) continue;
            if (e.closest("svg")) continue; // painted by fill; looked at apart
            const [a, b] = [luminance(parsed(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
            found.push([(a + 0.05) / (b + 0.05), walker.currentNode.textContent.slice(0, 40)]);
          }
          return found;
        })()"""
    )
    assert isinstance(found, list)
    return [(float(contrast), str(text)) for contrast, text in found]
