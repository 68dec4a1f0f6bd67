// A page in a frame of a notebook's widget: what is picked in it goes to Python, and what Python picks goes to it.
export default {
  render({ model, el }) {
    const frame = document.createElement("iframe");
    frame.setAttribute("sandbox", "allow-scripts");
    frame.setAttribute("title", "attention");
    frame.srcdoc = model.get("page");
    frame.style.cssText = `width: 100%; height: ${model.get("height")}px; border: 1px solid #8888; border-radius: 6px; resize: vertical;`;
    let heard = null; // what the frame has said last: it need not hear it again
    let first = true;
    const hear = (event) => {
      if (event.source !== frame.contentWindow || event.data?.graphlens !== "picked") return;
      const { layer, head, token } = event.data;
      if (![layer, head, token].every(Number.isInteger)) return;
      heard = `${layer}.${head}`;
      if (first) { // a page begins with its first head: one that Python picked before it was shown is picked instead
        first = false;
        const wanted = model.get("selected");
        if (wanted && `${wanted.layer}.${wanted.head}` !== heard) return tell();
      }
      model.set("selected", { layer, head, token });
      model.save_changes();
    };
    const tell = () => {
      const { layer, head } = model.get("selected") ?? {};
      if (`${layer}.${head}` !== heard) frame.contentWindow?.postMessage({ graphlens: "pick", layer, head }, "*");
    };
    window.addEventListener("message", hear);
    model.on("change:selected", tell);
    el.append(frame);
    return () => {
      window.removeEventListener("message", hear);
      model.off("change:selected", tell);
    };
  },
};
