// The page of `equip serve`: a chat, and beside it what the server's bounded cache still keeps of it.
// Nothing here parses a string as HTML: what a model writes becomes text nodes inside elements that this file names.
"use strict";

// ---- elements ------------------------------------------------------------------------------------------------------

const at = (id) => document.getElementById(id);

/** An element with these properties and children; a child may be a string. */
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** The same for SVG, whose attributes are no properties. */
function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const count = (n) => Math.round(n).toLocaleString("en");

// ---- Markdown ------------------------------------------------------------------------------------------------------

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const DEEPEST = 8; // blocks within blocks, and marks within marks; beyond it a text is plain
const SCHEMES = ["http:", "https:", "mailto:"];

/** Where the mark that was opened before `from` ends; -1 if it does not. */
function closing(text, mark, from) {
  for (let i = text.indexOf(mark, from); i >= 0; i = text.indexOf(mark, i + 1)) {
    const after = text[i + mark.length] ?? "";
    if (i === from || /\s/.test(text[i - 1])) continue;
    if (mark.length === 1 && (after === mark || text[i - 1] === mark)) continue;
    if (mark[0] === "_" && /\w/.test(after)) continue;
    return i;
  }
  return -1;
}

/** Whether a text is an address that may be followed. */
function isAddress(text) {
  try {
    return SCHEMES.includes(new URL(text).protocol); // which is none of the page's own: it must be whole
  } catch {
    return false;
  }
}

function link(url, text) {
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, text);
}

/** Add a text with its marks to an element. */
function addInline(parent, text, depth = 0) {
  const absent = new Set(); // what ends nowhere from here on, so that a row of marks costs one search
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  const find = (what, search) => {
    const found = absent.has(what) ? -1 : search();
    if (found < 0) absent.add(what);
    return found;
  };
  for (let i = 0; i < text.length; ) {
    const c = text[i];
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    if (c === "\n") {
      flush();
      parent.append(element("br"));
      i += 1;
      continue;
    }
    if (c === "`") {
      const ticks = /`+/y;
      ticks.lastIndex = i;
      const mark = ticks.exec(text)[0];
      const end = find(mark, () => text.indexOf(mark, i + mark.length));
      if (end >= 0) {
        flush();
        parent.append(element("code", {}, text.slice(i + mark.length, end).replace(/\n/g, " ")));
        i = end + mark.length;
      } else {
        plain += mark;
        i += mark.length;
      }
      continue;
    }
    if (c === "[") {
      const middle = find("](", () => text.indexOf("](", i));
      const end = middle < 0 ? -1 : find(")", () => text.indexOf(")", middle));
      const url = end < 0 ? "" : text.slice(middle + 2, end).split(/\s/)[0];
      if (isAddress(url)) {
        flush();
        parent.append(link(url, text.slice(i + 1, middle)));
        i = end + 1;
        continue;
      }
    }
    if ((c === "h" || c === "H") && !/\w/.test(text[i - 1] ?? "")) {
      const address = /https?:\/\/[^\s<>"'`()[\]*]*[^\s<>"'`()[\]*.,;:!?]/iy;
      address.lastIndex = i;
      const url = address.exec(text)?.[0];
      if (url && isAddress(url)) {
        flush();
        parent.append(link(url, url));
        i += url.length;
        continue;
      }
    }
    const [mark, name] = depth < DEEPEST ? (MARKS.find(([each]) => text.startsWith(each, i)) ?? []) : [];
    if (mark) {
      const begins = /\S/.test(text[i + mark.length] ?? "") && !(c === "_" && /\w/.test(text[i - 1] ?? ""));
      const end = begins ? find(mark, () => closing(text, mark, i + mark.length)) : -1;
      if (end >= 0) {
        flush();
        const inner = element(name);
        addInline(inner, text.slice(i + mark.length, end), depth + 1);
        parent.append(inner);
        i = end + mark.length;
      } else {
        plain += mark;
        i += mark.length;
      }
      continue;
    }
    plain += c;
    i += 1;
  }
  flush();
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((each) => each.trim());

function addTable(parent, lines) {
  const row = (name, line, n) => {
    const made = element("tr");
    const texts = cells(line);
    for (let i = 0; i < n; i++) {
      const cell = element(name);
      addInline(cell, texts[i] ?? "");
      made.append(cell);
    }
    return made;
  };
  const n = cells(lines[0]).length;
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row("td", line, n)));
  const table = element("table", {}, element("thead", {}, row("th", lines[0], n)), body);
  parent.append(element("div", { className: "wide" }, table));
}

/** A list from lines[i] on; the line behind it. */
function addList(parent, lines, i, depth) {
  const first = ITEM.exec(lines[i]);
  const isOrdered = /\d/.test(first[2]);
  const list = element(isOrdered ? "ol" : "ul");
  if (isOrdered) list.start = Number.parseInt(first[2], 10);
  const same = (line) => {
    const found = ITEM.exec(line);
    return found && found[1].length <= first[1].length + 1 && /\d/.test(found[2]) === isOrdered ? found : null;
  };
  while (i < lines.length) {
    const found = same(lines[i]);
    if (!found || RULE.test(lines[i])) break;
    const inside = [lines[i].slice(found[0].length)];
    const indent = found[1].length + 2;
    for (i += 1; i < lines.length; i++) {
      const line = lines[i];
      const width = line.length - line.trimStart().length;
      const isBlank = line.trim() === "";
      if (isBlank ? !/^ {2,}\S/.test(lines[i + 1] ?? "") : width < indent) break;
      inside.push(line.slice(Math.min(width, found[0].length)));
    }
    const item = element("li");
    if (inside.length === 1) addInline(item, inside[0]);
    else addBlocks(item, inside, depth + 1, true);
    list.append(item);
    if (lines[i]?.trim() === "" && same(lines[i + 1] ?? "")) i += 1;
  }
  parent.append(list);
  return i;
}

/** Add lines of Markdown to an element; isTight: paragraphs are no paragraphs. */
function addBlocks(parent, lines, depth, isTight = false) {
  if (depth > DEEPEST) {
    parent.append(lines.join("\n"));
    return;
  }
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    if (line.trim() === "") {
      i += 1;
      continue;
    }
    const fence = FENCE.exec(line);
    if (fence) {
      const inside = [];
      for (i += 1; i < lines.length; i++) {
        const text = lines[i].trim();
        if (text.startsWith(fence[1]) && text.replaceAll(fence[1][0], "") === "") break;
        inside.push(lines[i]);
      }
      i += 1;
      // it scrolls sideways, so a keyboard must reach it
      parent.append(element("pre", { tabIndex: 0 }, element("code", {}, inside.join("\n"))));
      continue;
    }
    const heading = HEADING.exec(line);
    if (heading) {
      const made = element(`h${Math.min(6, heading[1].length + 2)}`); // below the page's own
      addInline(made, heading[2]);
      parent.append(made);
      i += 1;
      continue;
    }
    if (RULE.test(line)) {
      parent.append(element("hr"));
      i += 1;
      continue;
    }
    if (QUOTE.test(line)) {
      const inside = [];
      for (; i < lines.length && QUOTE.test(lines[i]); i++) inside.push(lines[i].replace(QUOTE, ""));
      const quote = element("blockquote");
      addBlocks(quote, inside, depth + 1);
      parent.append(quote);
      continue;
    }
    if (ITEM.test(line)) {
      i = addList(parent, lines, i, depth);
      continue;
    }
    if (line.includes("|") && DIVIDER.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      const from = i;
      while (i < lines.length && lines[i].includes("|")) i += 1;
      addTable(parent, lines.slice(from, Math.max(i, from + 2)));
      i = Math.max(i, from + 2);
      continue;
    }
    const from = i;
    const ends = (text) =>
      text.trim() === "" || FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || ITEM.test(text);
    for (i += 1; i < lines.length && !ends(lines[i]); i++);
    const target = isTight ? parent : element("p");
    addInline(target, lines.slice(from, i).map((each) => each.trim()).join("\n"));
    if (!isTight) parent.append(target);
  }
}

/** The text as elements. */
function renderMarkdown(text) {
  const made = document.createDocumentFragment();
  addBlocks(made, text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
  return made;
}

// ---- what is kept --------------------------------------------------------------------------------------------------

const SINKS = 4; // streaming's default: until the server has told which tokens are gone

/**
 * Which tokens of a text can no longer be read: `ranges` of [begin, end, share], half open, where share is the part of
 * the cache that still has them; `how` it is known: "all", "server", "policy", or "unknown", and then ranges are empty.
 */
function lostRanges(now, lane) {
  const n = now.n_kept + now.n_evicted;
  if (!now.n_evicted) return { how: "all", ranges: [] };
  if (Array.isArray(lane?.kept)) {
    const ranges = [];
    let from = 0;
    for (const [begin, end, share = 1] of lane.kept) {
      if (begin > from) ranges.push([from, begin, 0]);
      if (share < 1) ranges.push([begin, end, share]);
      from = end;
    }
    if (from < n) ranges.push([from, n, 0]);
    return { how: "server", ranges };
  }
  if (now.policy === "streaming") return { how: "policy", ranges: [[SINKS, SINKS + now.n_evicted, 0]] };
  return { how: "unknown", ranges: [] };
}

const TOLD = {
  all: "Everything is readable.",
  server: "Dimmed text is no longer readable.",
  policy: "Dimmed text is no longer readable.",
  unknown: "The server tells how many tokens are gone, but not which, so no text is dimmed.",
  lost: "Where the evicted tokens stand in this chat could not be found out, so no text is dimmed.",
};

const PLACE = (i) => `\uE000${i}\uE001`; // private characters, which nobody writes

/**
 * Where each message's tokens begin: for each message `first`, the number of its first token, and `starts`, the offset in
 * its content of each of its tokens. The template tells where the messages stand, the tokenizer where the tokens do.
 * Null where the template changes the messages themselves.
 */
async function locate(messages) {
  const isAnswered = messages.at(-1).role === "assistant"; // a template may complete it, so something follows
  const tail = isAnswered ? [{ role: "user", content: PLACE("end") }] : [];
  const template = async (list) => (await post("apply-template", { messages: [...list, ...tail] })).prompt;
  const prompt = await template(messages);
  const frame = await template(messages.map(({ role }, i) => ({ role, content: PLACE(i) })));
  const places = [];
  let inFrame = 0;
  let inPrompt = 0;
  for (const [i, { content }] of messages.entries()) {
    const found = frame.indexOf(PLACE(i), inFrame);
    if (found < 0) return null;
    const before = frame.slice(inFrame, found);
    if (!prompt.startsWith(before, inPrompt)) return null;
    inPrompt += before.length;
    const text = prompt.startsWith(content, inPrompt) ? content : content.trim();
    if (!prompt.startsWith(text, inPrompt)) return null;
    places.push({ begin: inPrompt, end: inPrompt + text.length, skipped: content.indexOf(text) });
    inPrompt += text.length;
    inFrame = found + PLACE(i).length;
  }
  const body = { content: prompt.slice(0, inPrompt), add_special: true, parse_special: true, with_pieces: true };
  const { tokens } = await post("tokenize", body);
  return spread(prompt, tokens, places);
}

/** The tokens of each place of the prompt. */
function spread(prompt, tokens, places) {
  const decoder = new TextDecoder();
  const starts = [];
  let offset = 0;
  for (const { piece } of tokens) {
    const text = typeof piece === "string" ? piece : decoder.decode(new Uint8Array(piece), { stream: true });
    starts.push(offset);
    if (prompt.startsWith(text, offset)) offset += text.length;
    // tokenizers put a blank before the first word; a control token of their own is no part of the prompt
    else if (text[0] === " " && prompt.startsWith(text.slice(1), offset)) offset += text.length - 1;
  }
  let i = 0;
  return places.map(({ begin, end, skipped }) => {
    while (i < starts.length && starts[i] < begin) i += 1;
    const first = i;
    const own = [];
    for (; i < starts.length && starts[i] < end; i++) own.push(starts[i] - begin + skipped);
    return { first, starts: own };
  });
}

/** Ranges of tokens as [begin, end, share] in a message's content. */
function lostText(place, length, ranges) {
  const found = [];
  const offset = (token) => {
    const i = token - place.first;
    return i <= 0 ? 0 : i >= place.starts.length ? length : place.starts[i];
  };
  for (const [begin, end, share] of ranges) {
    if (end <= place.first || begin >= place.first + place.starts.length) continue;
    const [from, to] = [offset(begin), offset(end)];
    if (to > from) found.push([from, to, share]);
  }
  return found;
}

/**
 * Dim ranges of the source in what was rendered from it. Rendering leaves characters out and adds none but line ends, so
 * each character that is shown is the next one of its kind in the source.
 */
function dim(body, source, ranges) {
  if (!ranges.length) return;
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let offset = 0;
  const shareAt = (i) => ranges.find(([begin, end]) => i >= begin && i < end)?.[2] ?? 1;
  for (const node of nodes) {
    const text = node.data;
    const parts = [];
    for (let i = 0; i < text.length; i++) {
      const found = source.indexOf(text[i], offset);
      if (found >= 0 && found - offset < 2000) offset = found + 1;
      const share = shareAt(Math.max(0, offset - 1));
      if (parts.at(-1)?.share === share) parts.at(-1).text += text[i];
      else parts.push({ share, text: text[i] });
    }
    if (parts.every(({ share }) => share === 1)) continue;
    const make = ({ share, text: part }) =>
      share === 1 ? part : element("span", { className: share > 0 ? "part" : "gone" }, part);
    node.replaceWith(...parts.map(make));
  }
}

// ---- the server ----------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = sessionStorage.getItem("equip.key") ?? "";

/** The response, once it is one of success. Throws Refused with the server's sentence. */
async function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refused(said?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

const get = async (path) => (await ask(path)).json();
const post = async (path, body) => (await ask(path, { method: "POST", body: JSON.stringify(body) })).json();

/** Ask for a key; whether there is one now. */
async function needKey() {
  const box = at("key-box");
  at("key-why").textContent = key ? "The server does not take the key that was given." : "This server asks for a key.";
  at("key").value = "";
  box.returnValue = "";
  if (!box.open) box.showModal();
  await new Promise((resolve) => box.addEventListener("close", resolve, { once: true }));
  return box.returnValue === "given";
}

/** The JSON of each event of a stream. Throws Refused for an error in it. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const found = /^(data|error): ?(.*?)\r?$/.exec(line);
      if (!found || found[2] === "[DONE]") continue;
      const event = JSON.parse(found[2]);
      const error = found[1] === "error" ? event : event.error;
      if (error) throw new Refused(error.message ?? "The server broke the answer off.", error.code ?? 500);
      yield event;
    }
  }
}

// ---- chats ---------------------------------------------------------------------------------------------------------

const STORED = "equip.chat.";
const N_SAMPLES = 240;

/** A chat: `messages` as the server gets them, `now` what the last answer said of the cache, `samples` over the text. */
function newChat() {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, changed: Date.now(), system: "", messages: [], now: null, samples: [] };
}

function storedChats() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(STORED)) continue;
    try {
      const { id, changed, system, messages, now, samples } = JSON.parse(localStorage.getItem(name));
      const isChat = messages.every(({ role, content }) => typeof role === "string" && typeof content === "string");
      if (STORED + id === name && isChat && typeof system === "string" && Array.isArray(samples))
        found.push({ ...newChat(), id, changed, system, messages, now, samples });
    } catch {
      // written by something else
    }
  }
  return found.sort((a, b) => b.changed - a.changed);
}

let chats = storedChats();
let chat = chats[0] ?? newChat();
let running = null; // the answer that is being written: { controller, chat }
let lane = null; // of /slots, where it tells which tokens are kept

function save(which) {
  which.changed = Date.now();
  if (!chats.includes(which)) chats.push(which);
  chats.sort((a, b) => b.changed - a.changed);
  const { places, shown, ...kept } = which;
  try {
    localStorage.setItem(STORED + which.id, JSON.stringify(kept));
  } catch {
    showProblem("This browser has no room for more chats: what was said last is gone when the page is closed.");
  }
}

const title = (which) => which.messages[0]?.content.trim().split("\n")[0].slice(0, 60) || "New chat";

function sent(which) {
  const said = which.messages.map(({ role, content }) => ({ role, content }));
  return which.system.trim() ? [{ role: "system", content: which.system.trim() }, ...said] : said;
}

// ---- an answer -----------------------------------------------------------------------------------------------------

/** Take over what an event says of the cache. */
function measure(which, timings, state) {
  // without a policy nothing is evicted, and the answer says no more than how much was read and written
  const all = timings.cache_n + timings.prompt_n + timings.predicted_n;
  which.now = timings.policy ? timings : { ...timings, policy: "none", n_kept: all, n_evicted: 0 };
  const [n, ms] = [timings.predicted_n - state.n, timings.predicted_ms - state.ms];
  // the first token comes with the prompt
  if (timings.predicted_n < 2) Object.assign(state, { n: timings.predicted_n, ms: timings.predicted_ms });
  else if (n >= 4 && (ms > 500 || state.isLast)) {
    which.samples.push([which.now.n_kept + which.now.n_evicted, which.now.n_kept, (1000 * n) / ms]);
    if (which.samples.length > N_SAMPLES) which.samples = which.samples.filter((_, i) => i % 2 === 1);
    Object.assign(state, { n: timings.predicted_n, ms: timings.predicted_ms });
  }
}

/** Answer the last message of the chat that is open. */
async function answer() {
  const which = chat;
  const controller = new AbortController();
  const message = { role: "assistant", content: "", thoughts: "" };
  const body = JSON.stringify({ messages: sent(which), stream: true, timings_per_token: true, cache_prompt: true });
  running = { controller, chat: which };
  lane = null;
  which.messages.push(message);
  showProblem("");
  showAll();
  say("The model is answering.");
  const state = { n: 0, ms: 0, isLast: false };
  let how = "lost";
  try {
    find(which, sent(which).slice(0, -1)).then(() => which === chat && showCache());
    const response = await ask("v1/chat/completions", { method: "POST", body, signal: controller.signal });
    for await (const event of events(response)) {
      const { delta, finish_reason: finish } = event.choices?.[0] ?? {};
      message.content += delta?.content ?? "";
      message.thoughts += delta?.reasoning_content ?? "";
      state.isLast = Boolean(finish);
      if (event.timings) measure(which, event.timings, state);
      if (finish) how = finish;
      showSoon(which);
    }
    if (how === "lost") showProblem("The connection ended before the answer did.");
  } catch (error) {
    if (error.name === "AbortError") how = "stopped";
    else if (error.status === 401) how = "key";
    else showProblem(error instanceof Refused ? error.message : "The connection ended before the answer did.");
  }
  if (how !== "stop") message.ended = how;
  if (!message.content && !message.thoughts) which.messages.pop();
  running = null;
  save(which);
  showAll();
  say(how === "stopped" ? "Stopped." : how === "stop" || how === "length" ? "The answer is complete." : "");
  if (how === "key") {
    await begin();
    return;
  }
  await learn(which);
}

const asked = new WeakMap(); // of each chat: how often it was asked where its tokens stand

/** Where the tokens of these messages stand, once more if it is asked again: the last one that asked is answered. */
async function find(which, messages) {
  const turn = (asked.get(which) ?? 0) + 1;
  asked.set(which, turn);
  let places = null;
  try {
    if (messages.length) places = await locate(messages);
  } catch {
    // a template that refuses these messages
  }
  if (asked.get(which) === turn) which.places = places;
}

/** Ask which tokens are kept, and where they stand. */
async function learn(which) {
  if (!which.messages.length || !which.now) return;
  await find(which, sent(which));
  if (which !== chat) return;
  try {
    const lanes = await get("slots?kept=1");
    const { n_kept: n, n_evicted: gone } = which.now;
    const own = lanes.filter((each) => each.n_kept === n && each.n_evicted === gone);
    if (which === chat) lane = own.length === 1 ? own[0] : null;
  } catch {
    lane = null;
  }
  if (which === chat && !running) showAll();
}

async function send() {
  const text = at("text").value;
  if (!text.trim() || running) return;
  at("text").value = "";
  const last = chat.messages.at(-1);
  // one that was not answered: templates want user and assistant in turns
  if (last?.role === "user") last.content += `\n\n${text}`;
  else chat.messages.push({ role: "user", content: text });
  save(chat);
  await answer();
}

async function regenerate() {
  if (running) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  at("text").focus();
  await answer();
}

// ---- the conversation, shown ---------------------------------------------------------------------------------------

const say = (text) => (at("status").textContent = text);

function showProblem(text) {
  at("problem").hidden = !text;
  at("problem").textContent = text;
}

const button = (text, onclick, properties = {}) =>
  element("button", { type: "button", className: "small", textContent: text, onclick, ...properties });

const ENDED = {
  length: "ended by its limit", stopped: "stopped", lost: "broken off", key: "broken off",
};

function lostIn(which) {
  if (!which.now) return { how: "all", ranges: [] };
  const lost = lostRanges(which.now, which === chat ? lane : null);
  if (lost.ranges.length && !which.places) return { how: running ? lost.how : "lost", ranges: [] };
  return lost;
}

function messageElement(which, i, lost) {
  const message = which.messages[i];
  const place = which.places?.[i + (which.system.trim() ? 1 : 0)];
  const ranges = place ? lostText(place, message.content.length, lost.ranges) : [];
  const isUser = message.role === "user";
  const isLast = i === which.messages.length - 1;
  const body = element("div", { className: "body" });
  if (isUser) body.append(message.content);
  else body.append(renderMarkdown(message.content));
  dim(body, message.content, ranges);
  const n = message.content.trim().length;
  const isLost = n > 0 && ranges.length > 0 && !body.querySelector(".part") &&
    [...body.querySelectorAll(".gone")].reduce((sum, each) => sum + each.textContent.length, 0) >= body.textContent.trimEnd().length;
  const who = element("p", { className: "who" }, element("span", {}, isUser ? "You" : "Model"));
  const fates = [];
  if (ranges.length) fates.push(isLost ? "no longer readable by the model" : "partly readable by the model");
  if (message.ended) fates.push(ENDED[message.ended] ?? message.ended);
  if (fates.length) who.append(element("span", { className: "fate" }, fates.join(", ")));
  const made = element("article", { className: message.role }, who);
  made.classList.toggle("lost", isLost);
  if (message.thoughts) {
    const thoughts = element("div", {}, message.thoughts);
    made.append(element("details", { className: "thoughts" }, element("summary", {}, "Thoughts"), thoughts));
  }
  made.append(body);
  if (!running || !isLast) {
    const acts = element("div", { className: "acts" });
    if (!isUser) acts.append(button("Copy", () => navigator.clipboard?.writeText(message.content)));
    if (isLast) acts.append(button(isUser ? "Answer" : "Regenerate", regenerate));
    if (acts.children.length) made.append(acts);
  }
  return made;
}

/** The system prompt is a text like any other: it may be evicted too. */
function showSystem() {
  const text = chat.system.trim();
  const ranges = text && chat.places ? lostText(chat.places[0], text.length, lostIn(chat).ranges) : [];
  const isLost = ranges.length === 1 && ranges[0][2] === 0 && ranges[0][1] - ranges[0][0] >= text.length;
  const fate = isLost ? ", no longer readable by the model" : ranges.length ? ", partly readable by the model" : "";
  at("system-box").querySelector("summary").textContent = `System prompt${fate}${text ? `: ${text}` : ""}`;
}

/** Show the conversation. What has not changed stays, so that a selection and an opened part stay as well. */
function showLog() {
  const log = at("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const lost = lostIn(chat);
  if (log.chat !== chat) log.replaceChildren();
  log.chat = chat;
  log.setAttribute("aria-busy", String(running?.chat === chat));
  if (!chat.messages.length) {
    const text = "Nothing was said yet. This chat may grow for as long as you like: what the model can no longer read is dimmed here.";
    log.replaceChildren(element("p", { className: "hello" }, text));
    return;
  }
  log.querySelector(".hello")?.remove();
  for (let i = 0; i < chat.messages.length; i++) {
    const message = chat.messages[i];
    const place = chat.places?.[i + (chat.system.trim() ? 1 : 0)];
    const ranges = place ? lostText(place, message.content.length, lost.ranges) : [];
    const isLast = i === chat.messages.length - 1;
    const look = JSON.stringify([message.content.length, message.thoughts?.length, message.ended, ranges, isLast, isLast && Boolean(running)]);
    const old = log.children[i];
    if (old?.look === look && old.message === message) continue;
    const made = Object.assign(messageElement(chat, i, lost), { look, message });
    if (old?.querySelector("details")?.open) made.querySelector("details")?.setAttribute("open", "");
    if (old) old.replaceWith(made);
    else log.append(made);
  }
  while (log.children.length > chat.messages.length) log.lastChild.remove();
  if (isAtEnd || log.follows) log.scrollTop = log.scrollHeight;
  log.follows = false;
}

function polyline(points, n, most, name) {
  const text = points.map(([x, y]) => `${((300 * x) / n).toFixed(1)},${(78 - (74 * y) / most).toFixed(1)}`).join(" ");
  return shape("polyline", { points: text, class: name });
}

function showCache() {
  const now = chat.now;
  const n = now ? now.n_kept + now.n_evicted : 0;
  at("n-text").textContent = count(n);
  at("n-kept").textContent = count(now?.n_kept ?? 0);
  at("n-evicted").textContent = count(now?.n_evicted ?? 0);
  at("n-reread").textContent = count(now?.n_reread ?? 0);
  const lost = lostIn(chat);
  at("which").textContent = now && now.n_evicted === undefined ? "The server does not tell what it keeps." : TOLD[lost.how];
  const strip = at("strip");
  strip.replaceChildren();
  strip.setAttribute("aria-label", n ? `${count(now.n_kept)} of ${count(n)} tokens are readable` : "Nothing was said yet");
  if (n && lost.how !== "unknown" && lost.how !== "lost") {
    const bar = (from, to, name) =>
      to > from && strip.append(shape("rect", { x: (100 * from) / n, width: (100 * (to - from)) / n, y: 0, height: 6, class: name }));
    let from = 0;
    for (const [begin, end, share] of lost.ranges) {
      bar(from, begin, "have");
      if (share > 0) bar(begin, end, "some");
      from = end;
    }
    bar(from, n, "have");
  }
  const samples = chat.samples;
  const [memory, speed] = [at("memory"), at("speed")];
  memory.replaceChildren();
  speed.replaceChildren();
  at("memory-now").textContent = !now ? "" : `${count(now.n_kept)}${now.budget ? ` of at most ${count(now.budget)}` : ""} tokens`;
  at("speed-now").textContent = samples.length ? `${samples.at(-1)[2].toFixed(1)} tokens/s` : "";
  if (samples.length < 2) return;
  const longest = Math.max(...samples.map(([x]) => x));
  const fastest = 1.15 * Math.max(...samples.map(([, , y]) => y));
  memory.append(polyline([[0, 0], ...samples.map(([x]) => [x, x])], longest, longest, "text"));
  memory.append(polyline([[0, 0], ...samples.map(([x, kept]) => [x, kept])], longest, longest, "kept"));
  speed.append(polyline(samples.map(([x, , y]) => [x, y]), longest, fastest, "speed"));
  const slow = Math.min(...samples.map(([, , y]) => y));
  memory.setAttribute("aria-label", `The text grew to ${count(longest)} tokens; ${count(now.n_kept)} are kept`);
  speed.setAttribute("aria-label", `Between ${slow.toFixed(1)} and ${(fastest / 1.15).toFixed(1)} tokens per second`);
}

function showChats() {
  const open = (which) => {
    chat = which;
    lane = null;
    showDrawer("");
    at("system").value = which.system;
    at("log").follows = true;
    showProblem("");
    showAll();
    at("text").focus();
    if (!running) learn(which);
  };
  const remove = (which) => {
    if (running?.chat === which) running.controller.abort();
    if (!window.confirm(`Delete “${title(which)}”?`)) return;
    chats = chats.filter((each) => each !== which);
    localStorage.removeItem(STORED + which.id);
    if (which === chat) open(chats[0] ?? newChat());
    else showChats();
  };
  const items = (chats.includes(chat) ? chats : [chat, ...chats]).map((which) => {
    const name = title(which);
    const entry = button(name, () => open(which), { className: "open" });
    if (which === chat) entry.setAttribute("aria-current", "true");
    const gone = button("×", () => remove(which));
    gone.setAttribute("aria-label", `Delete ${name}`);
    return element("li", {}, entry, ...(chats.includes(which) ? [gone] : []));
  });
  const hadFocus = at("chat-list").contains(document.activeElement);
  at("chat-list").replaceChildren(...items);
  if (hadFocus) at("new-chat").focus();
  at("new-chat").onclick = () => open(newChat());
}

function showAll() {
  at("send").hidden = Boolean(running);
  at("stop").hidden = !running;
  showSystem();
  showChats();
  showLog();
  showCache();
}

let soon = 0;

/** Show an answer that grows, a few times a second at most. */
function showSoon(which) {
  if (which !== chat || soon) return;
  soon = setTimeout(() => {
    soon = 0;
    showSystem();
    showLog();
    showCache();
  }, 80);
}

/** On narrow screens: show the chats or the cache in the conversation's place; "" for neither. */
function showDrawer(name) {
  for (const each of ["chats", "cache"]) {
    const isShown = each === name && !at(each).classList.contains("shown");
    at(each).classList.toggle("shown", isShown);
    at(`show-${each}`).setAttribute("aria-expanded", String(isShown));
  }
}

// ---- begin ---------------------------------------------------------------------------------------------------------

/** Ask the server who it is, for as long as it takes. */
async function begin() {
  for (;;) {
    try {
      const models = await get("v1/models");
      const name = models.data?.[0]?.id ?? "a model";
      at("model").textContent = name;
      document.title = `${name}: equip serve`;
      const lanes = await get("slots").catch(() => []);
      const { policy, budget } = lanes[0] ?? {};
      const each = lanes.length > 1 ? `${lanes.length} lanes, each keeps` : "keeps";
      if (policy === undefined) at("policy").textContent = "the server does not tell its policy";
      else if (policy === "none") at("policy").textContent = `no policy: a chat ends after ${count(budget)} tokens`;
      else at("policy").textContent = `policy ${policy}: ${each} ${count(budget)} tokens`;
      at("change-key").hidden = !key;
      showProblem("");
      break;
    } catch (error) {
      if (error.status === 401) {
        at("change-key").hidden = false;
        if (await needKey()) continue;
        showProblem("Without its API key the server does not answer.");
        return;
      }
      showProblem(error.status === 503 ? "The server is loading its model." : error.message);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  if (!running) await learn(chat);
}

function start() {
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    at("log").follows = true;
    send();
  });
  const isTouched = window.matchMedia("(pointer: coarse)").matches;
  at("text").addEventListener("keydown", (event) => {
    // isComposing: Enter takes over a word of an input method
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouched) return;
    event.preventDefault();
    at("composer").requestSubmit();
  });
  const stop = () => {
    running?.controller.abort();
    at("text").focus();
  };
  at("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || at("key-box").open) return;
    const drawer = ["chats", "cache"].find((each) => at(each).classList.contains("shown"));
    if (drawer) {
      showDrawer("");
      at(`show-${drawer}`).focus();
    } else if (running) stop();
  });
  at("system").addEventListener("change", () => {
    chat.system = at("system").value;
    if (chat.messages.length) save(chat);
    showAll();
    if (!running) learn(chat);
  });
  for (const each of ["chats", "cache"]) at(`show-${each}`).addEventListener("click", () => showDrawer(each));
  at("change-key").addEventListener("click", async () => {
    if (await needKey()) await begin();
  });
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = at("key").value.trim();
    sessionStorage.setItem("equip.key", key);
    at("key-box").close("given");
  });
  at("system").value = chat.system;
  at("log").follows = true;
  showAll();
  at("text").focus();
  begin();
}

start();
