/** The HTTP interface of the server that this page came from, and its errors in one sentence. */

const KEY = "longtrail-api-key";

let askForKey = async () => false;
let asking = null;
let declined = false;

/** An answer that is not the one asked for; `message` is a sentence for people. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Says who asks for an API key when the server wants one.
 * @param {function(): Promise<boolean>} ask calls {@link useKey} and resolves to true, or to false.
 */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Sends this API key from now on; it lives in this tab only. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
  declined = false;
}

export const searchUsers = (prefix, limit, signal) =>
  get(`v1/users?${new URLSearchParams(prefix ? { prefix, limit } : { limit })}`, signal);

export const searchItems = (query, limit, signal) =>
  get(`v1/items?${new URLSearchParams({ query, limit })}`, signal);

export const getUser = (userId, signal) => get(`v1/users/${encodeURIComponent(userId)}`, signal);

export const getSimilar = (itemId, topK) =>
  get(`v1/items/${encodeURIComponent(itemId)}/similar?${new URLSearchParams({ top_k: topK })}`);

export const getModel = () => get("v1/model");

export const postRank = (body, signal) => request("v1/rank", { method: "POST", body, signal });

/**
 * Whether the server can rank; if not, why, else what an operator should look at.
 * @returns {Promise<{ready: boolean, notes: string[]}>}
 */
export async function getReadiness() {
  try {
    const { notes } = await get("readyz");
    return { ready: true, notes };
  } catch (error) {
    return { ready: false, notes: [error.message] };
  }
}

function get(path, signal) {
  return request(path, { signal });
}

async function request(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, options, key);
    if (response.status === 401 && (await newKey(key))) continue;
    const body = await response.json().catch(() => null);
    if (!response.ok) throw new ApiError(sentence(response, body), response.status);
    return body;
  }
}

async function send(path, { method = "GET", body, signal }, key) {
  const headers = { Accept: "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer: check that it runs, then try again.", 0);
  }
}

/**
 * Several requests may be refused at once: the person is asked once, and all of them wait. Who gave
 * no key is not asked again: the page has a button for it.
 */
async function newKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return true;
  if (declined) return false;
  asking ??= askForKey().then((given) => {
    declined = !given;
    return given;
  }).finally(() => { asking = null; });
  return asking;
}

function sentence(response, body) {
  const wait = response.headers.get("Retry-After");
  const text = detail(body) || `the server answered with status ${response.status}`;
  const whole = wait ? `${text}; try again in ${wait} s` : text;
  return `${whole[0].toUpperCase()}${whole.slice(1)}${/[.!?]$/.test(whole) ? "" : "."}`;
}

/** Every error has a `detail`: a text, or a list of problems that name their fields. */
function detail(body) {
  const found = body?.detail;
  if (typeof found === "string") return found.replace(/\.$/, "");
  if (!Array.isArray(found)) return "";
  return found.map((entry) => {
    if (typeof entry === "string") return entry;
    const field = entry.loc.filter((part) => part !== "body").join(".");
    return field ? `${field}: ${entry.msg}` : entry.msg;
  }).join("; ");
}
