// The model's session in ONNX Runtime: opened and run by plain data, in a worker or, where there can be none, in the page.

/** A module, of its address or its text. Blobs are made where they are read: those of a page from a file are nobody else's. */
export async function importModule(source) {
  if (typeof source === "string") return import(source);
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  try {
    return await import(url);
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** Opens a session. given: {wasm, graph, weights: [{path, data}]}, bytes. */
export async function openSession(ort, { wasm, graph, weights }) {
  ort.env.wasm.numThreads = 1; // more would need headers that a plain file server does not send
  ort.env.wasm.wasmBinary = wasm.buffer;
  // A graph with QuantizeLinear computes what is written, as in Python; 3: errors only.
  const options = { externalData: weights, logSeverityLevel: 3, extra: { session: { disable_quant_qdq: "1" } } };
  return ort.InferenceSession.create(graph, options);
}

/** One run. feeds: name -> {type, data, dims}. Gives name -> {data, dims} of the outputs that are named. */
export async function runSession(ort, session, feeds, outputs) {
  const tensors = Object.entries(feeds).map(([name, { type, data, dims }]) => [name, new ort.Tensor(type, data, dims)]);
  const results = await session.run(Object.fromEntries(tensors), outputs);
  return Object.fromEntries(outputs.map((name) => [name, { data: results[name].data, dims: [...results[name].dims] }]));
}
