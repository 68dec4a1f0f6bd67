// A table to sort and filter.
kinds.table = (host, view) => {
  const { columns, rows } = view; // cells are text, or numbers; null is nothing
  const MOST = 1000; // rows drawn at once
  let [by, down, wanted] = [null, false, ""];
  const isNumber = columns.map((_, c) => rows.some((row) => typeof row[c] === "number"));
  // NaN and infinities come as {n: "nan"}: JSON has none.
  const plain = (cell) => (cell !== null && typeof cell === "object" ? { nan: NaN, inf: Infinity, "-inf": -Infinity }[cell.n] : cell);
  const table = el("table", { class: "rows" });
  const note = el("p", { class: "axis", "aria-live": "polite" });
  function draw() {
    const found = rows.filter((row) => !wanted || row.some((cell) => typeof cell === "string" && cell.toLowerCase().includes(wanted)));
    const sorted = by === null ? found : [...found].sort((left, right) => {
      const [a, b] = [plain(left[by]), plain(right[by])];
      const none = (x) => x === null || Number.isNaN(x);
      if (none(a) || none(b)) return none(a) - none(b); // last in either order
      const order = typeof a === "number" && typeof b === "number" ? (a < b ? -1 : a > b ? 1 : 0) : String(a).localeCompare(String(b), "en", { numeric: true });
      return down ? -order : order;
    });
    const heads = columns.map((name, c) => {
      const button = el("button", { type: "button" }, name, by === c ? (down ? " ↓" : " ↑") : "");
      button.addEventListener("click", () => { [by, down] = by === c ? [c, !down] : [c, isNumber[c]]; draw(); table.querySelectorAll("th button")[c].focus(); });
      return el("th", { scope: "col", class: isNumber[c] ? "number" : null, "aria-sort": by === c ? (down ? "descending" : "ascending") : null }, button);
    });
    table.replaceChildren(el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...sorted.slice(0, MOST).map((row) => el("tr", {}, ...row.map((cell, c) => {
      const value = plain(cell);
      if (typeof value === "number") return el("td", { class: "number", "data-value": value, title: String(value) }, Number.isInteger(value) ? String(value) : long(value));
      return el("td", { class: isNumber[c] ? "number" : null }, value === null ? "" : shown(value));
    })))));
    note.textContent = sorted.length > MOST ? `${MOST} of ${sorted.length} rows are drawn: filter for others.` : wanted ? `${sorted.length} of ${rows.length} rows` : "";
  }
  const filter = el("input", { type: "search", id: `choice-${ids++}`, autocomplete: "off" });
  filter.addEventListener("input", () => { wanted = filter.value.toLowerCase(); draw(); });
  host.replaceChildren(...(rows.length > 12 ? [el("div", { class: "controls" }, el("label", { for: filter.id }, el("span", {}, "Filter"), filter))] : []),
    el("div", { class: "tall" }, table), note);
  draw();
};
