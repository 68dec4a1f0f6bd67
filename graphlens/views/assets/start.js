// Draws every view of the page. One that fails says so in its place, and the others are drawn.
for (const [index, view] of data.views.entries()) {
  const host = document.getElementById(`view-${index}`);
  try {
    kinds[view.kind]?.(host, view.data);
  } catch (error) {
    host.replaceChildren(el("p", {}, `This view could not be drawn: ${error.message}`));
    root.dataset.failed = `${view.kind}: ${error.stack}`;
  }
}
root.dataset.drawn = String(data.views.length);
