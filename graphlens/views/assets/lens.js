// The logit lens: the likeliest next token after each block, at each position; its probability, entropy, or a token's rank.
kinds.lens = (host, view) => {
  const { tokens, labels, vocabulary, top, targets } = view;
  const ids = decode(view.ids); // [layers, positions, top] into vocabulary
  const probability = decode(view.probability); // the same
  const figures = Object.fromEntries(Object.entries(view.figures).map(([name, packed]) => [name, decode(packed)]));
  const count = tokens.length;
  const names = Object.keys(figures);
  let by = names[0];
  const box = el("div", {});
  const below = el("div", {});
  const word = (i, j, k) => vocabulary[ids[(i * count + j) * top + k]];
  function draw() {
    const values = figures[by];
    // Ranks run over orders of magnitude, so their colour goes by the logarithm; few is good, and dark.
    const isRank = by.startsWith("rank");
    const figure = (v) => (isRank ? -Math.log10(1 + v) : v);
    const [least, most] = finiteRange(values.map(figure));
    const scale = isRank ? scaleOf(least, Math.max(most, 0)) : by.includes("probability") ? scaleOf(0, 1) : scaleOf(Math.min(0, least), most);
    const value = (i, j) => values[i * count + j];
    cells(box, {
      rows: labels, columns: tokens, value, rowAxis: "after", columnAxis: "position", word: true,
      colour: (i, j) => scale.colour(figure(value(i, j))),
      text: (i, j) => (by === names[0] ? shown(word(i, j, 0)) : short(value(i, j))),
      tell: (i, j) => [
        `${labels[i]}, token ${view.places[j]} ${shown(tokens[j])}`,
        ...Array.from({ length: top }, (_, k) => `${long(probability[(i * count + j) * top + k]).padEnd(10)} ${shown(word(i, j, k))}`),
        ...names.slice(1).map((name) => `${name}: ${long(figures[name][i * count + j])}`),
        ...(targets[j] === null ? [] : [`the token in question: ${shown(targets[j])}`]),
      ].join("\n"),
    });
    below.replaceChildren(isRank
      ? el("p", { class: "axis" }, "0 is the likeliest token; darker is nearer to it (colour by logarithm); grey: no such token")
      : legend(scale, by.includes("token in question") ? { missing: "no token in question here" } : {}));
  }
  host.replaceChildren(
    el("div", { class: "controls" }, choice("Colour by", names.map((name) => [name, name]), by, (value) => { by = value; draw(); })),
    box, below);
  draw();
  repaints.push(draw);
};
