// A thread of its own for the session, so that the page answers while a model opens and runs.
import { importModule, openSession, runSession } from "./engine.js";

let ort = null;
let session = null;
const jobs = {
  load: async (source) => { ort = await importModule(source); },
  open: async (given) => { session = await openSession(ort, given); },
  run: async ({ feeds, outputs }) => runSession(ort, session, feeds, outputs),
};
onmessage = async ({ data: { id, job, given } }) => {
  try {
    const found = await jobs[job](given);
    const sent = job === "run" ? [...new Set(Object.values(found).map(({ data }) => data.buffer))] : [];
    postMessage({ id, found }, sent);
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};
