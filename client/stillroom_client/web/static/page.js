// The page of a device. It speaks to its own server only. What comes from documents becomes text nodes, never HTML; the query
// is kept in memory alone: not in the address, the history or any storage of the browser.

const $ = (id) => document.getElementById(id);
const el = {};
for (const id of ["query", "clear", "mode", "type", "owner", "folder", "year", "more", "reset", "line", "where", "where-error",
  "banner", "count", "results", "empty", "reader", "held", "panel", "panel-title", "panel-body", "close"]) el[id] = $(id);
const narrow = () => matchMedia("(max-width: 59.99rem)").matches;
const DEBOUNCE = 40; // milliseconds between two searches of who types fast; the first letter after a pause does not wait
const TAB = crypto.randomUUID();
const state = { status: null, results: [], active: -1, open: null, reach: 3, number: 0, query: "", sent: null };

// ---- elements

function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
const marked = (parts) => parts.map(([text, mark]) => (mark ? h("mark", {}, text) : text));
const many = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
const button = (text, onclick, name = "button", more = {}) => h("button", { type: "button", class: name, onclick, ...more }, text);

// ---- the server

function token() {
  const given = /^#([0-9a-f]{64})$/.exec(location.hash);
  if (given) {
    sessionStorage.setItem("token", given[1]);
    history.replaceState(null, "", "/");
  }
  return sessionStorage.getItem("token") ?? "";
}

class Refused extends Error {
  constructor(status, body) {
    super(body.error ?? `the server answered ${status}`);
    this.status = status;
    this.place = body.place ?? null;
  }
}

async function ask(path, body = {}, signal = undefined) {
  let answer;
  try {
    answer = await fetch(`/api/${path}`, {
      method: "POST", signal, body: JSON.stringify(body), cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer",
      headers: { "content-type": "application/json", authorization: `Bearer ${token()}` },
    });
  } catch (error) {
    if (error.name !== "AbortError") tell("The server does not answer. Start it again: stillroom serve --web, and open the address it prints.");
    throw error;
  }
  const value = await answer.json();
  if (answer.status === 401) locked();
  if (!answer.ok) throw new Refused(answer.status, value);
  tell("");
  return value;
}

function tell(text) {
  el.banner.hidden = !text;
  if (el.banner.textContent !== text) el.banner.textContent = text;
}
// For what is asked on a click: shows what was refused where everybody looks.
const shown = (work) => work.catch((error) => {
  if (error instanceof Refused && error.status !== 401) tell(error.message);
});

function locked() {
  const given = h("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", "aria-label": "Address or token" });
  const use = (event) => {
    event.preventDefault();
    const found = /[0-9a-f]{64}/.exec(given.value);
    if (!found) return;
    sessionStorage.setItem("token", found[0]);
    begin();
  };
  list([], "");
  el.empty.replaceChildren(
    h("h2", {}, "This page needs its key"),
    h("p", { class: "soft" }, "Open the whole address that stillroom serve --web printed, or paste it here. It changes each time the server starts."),
    h("form", { onsubmit: use }, given, h("button", { class: "button main" }, "Open")),
  );
}

// ---- searching

let timer = 0;
let asking = null;
let began = -DEBOUNCE;

function narrowing() {
  const [kind, year] = el.year.value.split(":");
  return {
    where: el.line.hidden ? "" : el.where.value, type: el.type.value || null, owner: el.owner.value || null, folder: el.folder.value || null,
    year: kind === "in" ? Number(year) : null, since: kind === "since" ? Number(year) : null,
  };
}

function soon() {
  clearTimeout(timer);
  const wait = began + DEBOUNCE - performance.now();
  if (wait > 0) timer = setTimeout(search, wait);
  else search();
}

async function search() {
  clearTimeout(timer);
  asking?.abort();
  began = performance.now();
  const mine = (asking = new AbortController());
  const query = el.query.value.trim();
  const chosen = narrowing();
  el.clear.hidden = !el.query.value;
  el.reset.hidden = !Object.values(chosen).some(Boolean);
  for (const id of ["type", "owner", "folder", "year"]) el[id].classList.toggle("on", Boolean(el[id].value));
  try {
    const found = await ask("search", { query, mode: el.mode.value, narrow: chosen, tab: TAB, number: ++state.number }, mine.signal);
    if (mine.signal.aborted) return;
    wrongFilter(null);
    state.query = query;
    list(found.results, query ? many(found.results.length, "result") + `, ${found.milliseconds} ms` : "");
    if (!query) welcome();
    else if (!found.results.length) nothing(found.where);
  } catch (error) {
    if (error.place !== undefined && error.place !== null) wrongFilter(error);
    else if (error instanceof Refused && ![401, 409].includes(error.status)) tell(error.message);
  }
}

function wrongFilter(error) {
  el["where-error"].hidden = !error;
  el.where.toggleAttribute("aria-invalid", Boolean(error));
  if (error) el["where-error"].textContent = `${" ".repeat(error.place)}↑ ${error.message}`;
}

function list(results, count) {
  state.results = results;
  el.results.replaceChildren(...results.map(hit));
  el.results.hidden = !results.length;
  el.query.setAttribute("aria-expanded", String(Boolean(results.length)));
  el.count.textContent = count;
  el.empty.replaceChildren();
  activate(results.length ? 0 : -1, false);
}

function hit(result, index) {
  const where = [result.name !== result.title && h("span", { class: "name" }, result.name), result.section && result.section !== result.title &&
    h("span", {}, result.section), result.position && h("span", {}, result.position), !result.name && h("span", {}, result.owner)];
  return h("li", {
    id: `hit-${index}`, role: "option", class: `hit${state.open === result.id ? " open" : ""}`, "aria-selected": "false", dir: "auto",
    onclick: () => open(index),
  }, h("div", { class: "hit-title" }, result.title || result.id), h("div", { class: "hit-where", title: result.document || result.id }, where),
  h("div", { class: "hit-text" }, marked(result.snippet)));
}

function activate(index, scroll = true) {
  el.results.children[state.active]?.setAttribute("aria-selected", "false");
  state.active = index;
  const chosen = el.results.children[index];
  if (!chosen) return el.query.removeAttribute("aria-activedescendant");
  chosen.setAttribute("aria-selected", "true");
  el.query.setAttribute("aria-activedescendant", chosen.id);
  if (scroll) chosen.scrollIntoView({ block: "nearest" });
}

async function welcome() {
  const { status } = state;
  if (!status) return;
  if (!status.passages) {
    el.empty.replaceChildren(h("h2", {}, "No documents yet"), h("p", { class: "soft" }, "Type this in a terminal, with files or folders of yours:"),
      h("code", { class: "line" }, status.add), h("p", { class: "soft" }, "Text, Markdown, HTML, PDF, Word, e-mail and source code. They stay where they are, and what is read stays here."),
      button("Look again", () => begin()));
    return;
  }
  const documents = status.choices.types.reduce((sum, [, count]) => sum + count, 0);
  const intro = [h("h2", {}, "What are you looking for?"),
    h("p", { class: "soft" }, `Ask in your own words: ${many(documents, "document")} on ${status.device} are searched by meaning and by words. `,
      h("span", { class: "by-keys" }, h("kbd", {}, "↑"), " ", h("kbd", {}, "↓"), " choose, ", h("kbd", {}, "Enter"), " opens, ", h("kbd", {}, "?"), " shows all keys."))];
  el.empty.replaceChildren(...intro);
  const { opened } = await ask("feedback");
  const queries = [...new Set(opened.map((pair) => pair.query))].slice(0, 5);
  if (el.query.value || !queries.length) return;
  el.empty.replaceChildren(...intro, h("h3", {}, "Searched before"), ...queries.map((query) => button(query, () => {
    el.query.value = query;
    el.query.focus();
    search();
  }, "again")));
}

function nothing(where) {
  const hint = el.mode.value === "bm25" ? "No passage has one of these words." : "No passage fulfils the filter.";
  el.empty.replaceChildren(h("h2", {}, "Nothing found"), h("p", { class: "soft" }, state.status?.passages ? hint : "There are no documents yet."),
    where && button("Search everything", widen));
}

function widen() {
  for (const id of ["type", "owner", "folder", "year", "where"]) el[id].value = "";
  search();
}

// ---- reading

async function open(index) {
  const result = state.results[index];
  if (!result) return;
  activate(index);
  state.reach = 3;
  const query = state.query;
  const kept = ask("opened", { query, id: result.id });
  if (!document.body.classList.contains("reading")) {
    document.body.classList.add("reading");
    history.pushState({ reading: true }, ""); // so that a phone's way back leads to the list
  }
  await shown(read(result.id, query, kept));
  for (const [n, item] of [...el.results.children].entries()) item.classList.toggle("open", n === index);
  el.reader.focus({ preventScroll: true });
}

async function read(id, query, kept = null) {
  const found = await ask("passage", { id, query, reach: state.reach });
  state.open = id;
  const wider = (text, more) => more && button(text, async () => {
    state.reach = Math.min(200, state.reach * 3);
    await shown(read(id, query));
  }, "plain widen");
  const about = [...found.about.map(([, value]) => value), found.passages_in_document > 1 && `passage ${found.place} of ${found.passages_in_document.toLocaleString("en")}`];
  const note = kept ? h("p", { class: "kept", role: "status" }) : el.reader.querySelector(".kept");
  el.reader.replaceChildren(
    h("div", { class: "read-head", dir: "auto" }, h("h2", {}, found.title || found.id), button("✕", closeReader, "plain", { "aria-label": "Back to the results" }),
      found.document && h("p", { class: "path" }, found.document, " ", button("copy", (event) => copy(found.document, event.target), "link small")),
      h("p", { class: "soft small" }, about.filter(Boolean).join(" · ") || found.owner)),
    wider("Show more above", found.more_before) || "", ...sections(found, note), wider("Show more below", found.more_after) || "",
  );
  el.reader.hidden = false;
  if (kept) await noted(note, kept, { query, id });
  show(el.reader.querySelector(".chosen"));
}

// The passage stands below the head of the reader, with a little of what comes before it.
function show(chosen) {
  const above = el.reader.querySelector(".read-head").offsetHeight + 56;
  if (narrow()) scrollTo(0, chosen.getBoundingClientRect().top + scrollY - above);
  else el.reader.scrollTop = chosen.offsetTop - above;
}

function sections(found, note) {
  let before = null;
  return found.passages.map((passage) => {
    const heading = passage.section && passage.section !== before ? passage.section : null;
    before = passage.section;
    return h("section", { class: `passage${passage.chosen ? " chosen" : ""}`, "aria-current": passage.chosen ? "true" : null, dir: "auto" },
      passage.position && h("span", { class: "at" }, passage.position), heading && h("h3", {}, heading),
      passage.chosen && note, h("div", { class: `body${passage.code ? " code" : ""}`, tabindex: passage.code ? "0" : null }, marked(passage.parts)));
  });
}

// Opening is what the device learns from, so the reader sees it, and can take it back.
async function noted(note, kept, pair) {
  try {
    held((await kept).opened);
    note.replaceChildren(h("span", {}, "Kept on this device to learn from: opened for “", h("b", {}, pair.query), "”."), button("Undo", async () => {
      held((await ask("feedback/erase", { opened: pair })).opened);
      note.replaceChildren(h("span", {}, "Forgotten. This opening is not learned from."));
    }, "link"));
  } catch (error) {
    note.replaceChildren(h("span", { class: "warn" }, `Not kept: ${error.message}`));
  }
}

function closeReader() {
  if (history.state?.reading) history.back();
  else leaveReader();
}

function leaveReader() {
  document.body.classList.remove("reading");
  el.reader.hidden = true;
  state.open = null;
  for (const item of el.results.children) item.classList.remove("open");
  el.query.focus();
}

async function copy(text, from) {
  await navigator.clipboard.writeText(text);
  from.textContent = "copied";
}

// ---- panels

const titles = { opened: "What you opened", learned: "What was learned", privacy: "Privacy", keys: "Keys and help" };
const panels = { opened, learned, privacy, keys };

async function panel(name) {
  el["panel-title"].textContent = titles[name];
  el.panel.classList.toggle("wide", name === "learned");
  el["panel-body"].replaceChildren(h("p", { class: "soft" }, "…"));
  if (!el.panel.open) el.panel.showModal();
  try {
    el["panel-body"].replaceChildren(...(await panels[name]()).filter(Boolean));
  } catch (error) {
    el["panel-body"].replaceChildren(h("p", { class: "warn" }, error.message));
  }
}
const part = (title, ...children) => h("section", {}, title && h("h3", {}, title), ...children);
const soft = (...text) => h("p", { class: "soft small" }, ...text);
const table = (heads, rows) => h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
  h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));
const facts = (pairs) => h("dl", {}, pairs.filter(Boolean).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

async function opened() {
  const found = await ask("feedback");
  held(found.opened.length);
  const erase = async (body) => {
    await shown(ask("feedback/erase", body));
    await panel("opened");
    if (!el.query.value) welcome();
  };
  const sure = button("Erase all", () => {
    sure.replaceWith(button(`Erase ${many(found.opened.length, "opening")} for good`, () => erase({}), "button warn"));
  });
  return [part(null, soft("Which result you opened after which query. It is kept on this device only; rounds that the device takes part in learn from it. Erasing removes it from the disk.")),
    part(many(found.opened.length, "opening"), ...found.opened.map((pair) => h("div", { class: "pair", dir: "auto" }, h("div", { class: "what" }, pair.query),
      h("div", { class: "to" }, [pair.title, pair.name !== pair.title && pair.name].filter(Boolean).join(" · ")),
      button("Erase", () => erase({ opened: { query: pair.query, id: pair.id } }), "link", { "aria-label": `Erase the opening for ${pair.query}` }))),
    !found.opened.length && soft("Nothing yet. Open a result, and it appears here.")),
    found.opened.length ? part(null, sure) : null];
}

async function learned() {
  const found = await ask("learned", { query: state.query, mode: el.mode.value, narrow: narrowing() });
  const { adapter, compared } = found;
  const parts = [adapter
    ? part("Adapter in use", facts([["Round", String(adapter.round)], ["Release", h("code", {}, found.release.slice(0, 16))]]),
      h("p", { class: "small" }, adapter.statement ?? "It has no privacy statement that this version reads: ask its publisher what it costs."))
    : part("No adapter yet", h("p", {}, "This device searches with the release as it came", found.release_round ? ` (round ${found.release_round})` : "",
      ". Rounds that devices take part in make an adapter of some tens of kilobytes, and this is where you see what it changes."),
    facts([["Release", h("code", {}, found.release.slice(0, 16))]]))];
  if (compared) {
    const side = (title, hits, after) => h("div", {}, h("h3", {}, title), h("ol", {}, hits.map((result) => h("li", { dir: "auto" }, h("span", { class: "n" }, String(result.rank)),
      h("span", {}, result.title || result.id, h("small", {}, [result.name !== result.title && result.name, result.position].filter(Boolean).join(" · "))),
      h("span", {}, after ? moved(result) : result.other_rank === null ? h("span", { class: "d" }, "out") : "")))));
    parts.push(part(`“${state.query}”`, soft(compared.moved ? `${many(compared.moved, "result")} of ${compared.with.length} stand elsewhere with what was learned.` : "The same results in the same order."),
      h("div", { class: "sides" }, side("Without", compared.without, false), side("With the adapter", compared.with, true))));
  } else if (adapter) parts.push(part(null, soft(el.mode.value === "bm25" ? "Ranking by words alone uses no adapter." : "Search for something first: then both rankings, without the adapter and with it, stand here.")));
  parts.push(part("What the device learns from", soft(`${many(found.opened, "opening")} of results, kept on this device. `, button("Show", () => panel("opened"), "link"))));
  return parts;
}

function moved(result) {
  if (result.other_rank === null) return h("span", { class: "d up" }, "new");
  const by = result.other_rank - result.rank;
  if (!by) return h("span", { class: "d" }, "–", h("span", { class: "hidden" }, "same place"));
  return h("span", { class: `d ${by > 0 ? "up" : "down"}` }, `${by > 0 ? "▲" : "▼"} ${Math.abs(by)}`, h("span", { class: "hidden" }, by > 0 ? "higher" : "lower"));
}

const up = (value) => (Math.ceil(value * 100 - 1e-9) / 100).toFixed(2); // what was spent is never rounded down
const down = (value) => (Math.floor(value * 100 + 1e-9) / 100).toFixed(2);
const cost = (found) => (found.unknown ? found.unknown : found.epsilon === null ? "no guarantee" : `epsilon ${up(found.epsilon)}`);
const meaning = (found) => [found.unit && `${found.unit} level`, found.delta && `delta ${found.delta.toExponential(0)}`].filter(Boolean).join(", ");

async function privacy() {
  const found = await ask("privacy");
  const sums = h("div", { id: "sums", "aria-busy": "true" }, part("Budget", soft("Adding up what was spent …")));
  budget(sums);
  const parts = [participation(found), sums, lastSent(found.sent)];
  if (found.attempts.length) {
    parts.push(part("Asked of this device", table(["Federation", "Round", "Attempt", "What became of it"], found.attempts.slice(0, 8).map(attempt)),
      found.attempts.length > 8 && h("details", {}, h("summary", {}, `${found.attempts.length - 8} earlier`), table(["Federation", "Round", "Attempt", ""], found.attempts.slice(8).map(attempt)))));
  }
  parts.push(part("What never leaves", soft("Queries, documents, their vectors and what you opened. A round sends one vector of fixed length, clipped and counted here before it goes.")));
  return parts;
}
const attempt = (asked) => [asked.federation, `${asked.round}${asked.purpose === "evaluation" ? " (evaluation)" : ""}`, String(asked.attempt), asked.reason ? `${asked.outcome}: ${asked.reason}` : asked.outcome];

function participation({ consent, needs_limit }) {
  const on = consent.takes_part;
  const control = h("button", { type: "button", class: "switch", role: "switch", "aria-checked": String(on), "aria-labelledby": "part-label", onclick: async () => {
    if (on) {
      await shown(ask("leave"));
      await panel("privacy");
      el["panel-body"].querySelector(".switch")?.focus();
    } else $("join").toggleAttribute("hidden");
  } });
  const federation = consent.federation ?? "whichever its node is connected to";
  return part(null, h("div", { class: "row" }, h("div", {}, h("h3", { id: "part-label" }, on ? "Takes part in rounds" : "Has left"),
    soft(on ? `Federation: ${federation}. Switch off to leave: from then on every order is declined, also one that is being answered.`
      : "Every order is declined. The coordinator sees what a device sends that has nothing to say, not that you left. What was spent before stays spent.")), control),
  on && needs_limit && h("p", { class: "warn small" }, "Rounds under local are declined until a limit is set: stillroom budget --limit EPSILON."),
  !on && joining(consent, federation));
}

function joining(consent, federation) {
  const limit = h("input", { type: "text", inputmode: "decimal", id: "limit", value: consent.limit_epsilon ?? "", placeholder: "none", autocomplete: "off" });
  const agree = h("input", { type: "checkbox", required: true, id: "agree" });
  const submit = async (event) => {
    event.preventDefault();
    const given = limit.value.trim().replace(",", ".");
    try {
      await ask("join", { agree: agree.checked, seen: consent, limit_epsilon: given && given !== "none" ? Number(given) : null });
      await panel("privacy");
    } catch (error) {
      problem.textContent = error.message;
    }
  };
  const problem = h("p", { class: "warn small", role: "alert" });
  return h("form", { class: "join", id: "join", hidden: true, onsubmit: submit, novalidate: false }, h("p", {}, "To take part again, agree to this:"),
    facts([["Federation", federation], ["Mechanisms", consent.mechanisms.join(", ")], ["Least noise", `multiplier ${consent.minimum_noise_multiplier}`],
      ["Most attempts", consent.participations.toLocaleString("en")]]),
    h("label", { for: "limit" }, "All rounds together may cost epsilon", limit), soft(`at delta ${consent.limit_delta.toExponential(0)}, counted over everything this device ever joined, against peers and network observers. Empty: no limit besides the attempts.`),
    h("label", {}, agree, h("span", {}, "I agree that this device takes part up to this limit.")), problem, h("div", {}, h("button", { class: "button main" }, "Take part again")));
}

// Accounting may take seconds: leaving does not wait for it.
async function budget(sums) {
  try {
    const found = await ask("budget");
    sums.replaceChildren(...(found.budget ? spending(found) : [part("Budget", h("p", { class: "warn" }, found.problem))]));
  } catch (error) {
    sums.replaceChildren(part("Budget", h("p", { class: "warn" }, error.message)));
  }
  sums.removeAttribute("aria-busy");
}

function spending({ budget }) {
  const own = budget.own_participations;
  const limited = own.limit !== null;
  const spent = own.epsilon === null ? "no guarantee" : up(own.epsilon);
  return [part("Budget", h("p", {}, h("span", { class: "big" }, spent), own.epsilon === null ? ", because a round without enough noise was joined" : limited ? ` of ${own.limit} epsilon` : " epsilon spent, no limit set"),
    limited && own.epsilon !== null && h("meter", { min: 0, max: own.limit, high: own.limit * 0.9, low: 0, optimum: 0, value: Math.min(own.epsilon, own.limit), "aria-label": `epsilon ${spent} of ${own.limit} spent` }),
    soft(`${limited ? `${down(own.left)} left. ` : ""}${own.attempts.toLocaleString("en")} of ${own.cap.toLocaleString("en")} attempts; ${own.left_attempts.toLocaleString("en")} more like the last one are allowed.`),
    table(["Against", "What counts", "Cost"], [
      [own.adversary, "what this device joined", [h("b", {}, cost(own)), h("br"), h("span", { class: "soft" }, meaning(own))]],
      [budget.all_rounds.adversary, budget.all_rounds.rounds === null ? "all rounds" : many(budget.all_rounds.rounds, "round"), [h("b", {}, cost(budget.all_rounds)), h("br"), h("span", { class: "soft" }, meaning(budget.all_rounds))]],
      [budget.coordinator.adversary, "single updates", [h("b", {}, cost(budget.coordinator)), h("br"), h("span", { class: "soft" }, meaning(budget.coordinator))]],
    ]), budget.all_rounds.rehearsal && h("p", { class: "warn small" }, "Rehearsal: the noise came from a known seed, and binds nobody who knows it.")),
  budget.spent.length ? part("Rounds joined", table(["Federation", "Rounds", "Attempts charged", "Declined"], budget.spent.map((row) => [row.federation, ...[row.rounds, row.attempts, row.declined].map((n) => n.toLocaleString("en"))])))
    : part("Rounds joined", soft("None yet: this device has not been asked by any federation. A node of Flower that knows this home takes it into one."))];
}

function lastSent(sent) {
  if (!sent) return part("Last update sent", soft("None on record."));
  const at = new Date(sent.at);
  return part("Last update sent", facts([["When", h("time", { datetime: sent.at }, at.toLocaleString("en", { dateStyle: "medium", timeStyle: "short" }))], ["For", `${sent.purpose} ${sent.round} of ${sent.federation}, attempt ${sent.attempt}`],
    ["Size", `${sent.size.toLocaleString("en")} bytes`], ["Made of", sent.own ? "what you opened, clipped" : "nothing of yours: what every device sends that declines"]]));
}

async function keys() {
  const row = (keyNames, what) => [h("span", {}, keyNames.flatMap((key, n) => [n ? " " : "", h("kbd", {}, key)])), what];
  return [part(null, table(["Key", "Does"], [row(["/"], "to the search"), row(["↑", "↓"], "choose a result"), row(["Enter"], "open it"), row(["Esc"], "back to the search; there, clear it"), row(["?"], "this help")])),
    part("Filters", soft("The lists narrow the search before it ranks. The filter line takes more: comparisons (= != < <= > >=), in (a, b), not, and, or, brackets; quote what has blanks."),
      h("code", { class: "line" }, "type=pdf and year>=2020 and not owner in (work, 'old things')")),
    part("Who sees this page", soft("Only who has the address: its last part is a key that is new each time the server starts. Nothing you type is kept, except what you open.")),];
}

// ---- beginning

function held(count) {
  const { status } = state;
  if (status) el.held.textContent = `${many(status.passages, "passage")} on ${status.device} · ${many(count, "opening")} kept`;
}

function choose(select, first, options) {
  const before = select.value;
  select.replaceChildren(h("option", { value: "" }, first), ...options);
  select.value = before;
  if (select.selectedIndex < 0) select.value = "";
  select.parentElement.hidden = !options.length;
}
const option = (value, text) => h("option", { value }, text);

async function begin() {
  const status = (state.status = await ask("status"));
  const { types, owners, folders, years } = status.choices;
  choose(el.type, "Any type", types.map(([type, count]) => option(type, `${type} (${count.toLocaleString("en")})`)));
  choose(el.owner, "Any owner", owners.length > 1 ? owners.map(([owner]) => option(owner, owner)) : []);
  choose(el.folder, "Any folder", folders.length > 1 ? folders.map(([path, label, count]) => option(path, `${label} (${count.toLocaleString("en")})`)) : []);
  choose(el.year, "Any year", years.length > 1 ? [...years.map(([year, count]) => option(`in:${year}`, `${year} (${count.toLocaleString("en")})`)),
    ...years.slice(1).map(([year]) => option(`since:${year}`, `since ${year}`))] : []);
  held(status.opened);
  document.title = `${status.device} · Stillroom`;
  await search();
}

el.query.addEventListener("input", soon);
el.where.addEventListener("input", soon);
for (const id of ["mode", "type", "owner", "folder", "year"]) el[id].addEventListener("change", search);
el.clear.addEventListener("click", () => { el.query.value = ""; el.query.focus(); search(); });
el.reset.addEventListener("click", widen);
el.more.addEventListener("click", () => {
  el.line.hidden = !el.line.hidden;
  el.more.setAttribute("aria-expanded", String(!el.line.hidden));
  if (!el.line.hidden) el.where.focus();
  search();
});
document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
el.query.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const last = state.results.length - 1;
  const steps = { ArrowDown: Math.min(last, state.active + 1), ArrowUp: Math.max(0, state.active - 1) };
  if (event.key in steps && last >= 0) activate(steps[event.key]);
  else if (event.key === "Enter") enter();
  else if (event.key === "Escape" && el.query.value) { el.query.value = ""; search(); }
  else return;
  event.preventDefault();
});

// What is opened is what stands there for what was typed, so a search that is still to come is made first.
async function enter() {
  if (el.query.value.trim() !== state.query) await search();
  if (el.query.value.trim() === state.query) await open(state.active);
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || el.panel.open) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && document.body.classList.contains("reading")) closeReader();
  else if (event.key === "/" && !typing) { el.query.focus(); el.query.select(); }
  else if (event.key === "?" && (!typing || (event.target === el.query && !el.query.value))) panel("keys");
  else return;
  event.preventDefault();
});
for (const opener of document.querySelectorAll("[data-panel]")) opener.addEventListener("click", () => panel(opener.dataset.panel));
el.close.addEventListener("click", () => el.panel.close());
el.panel.addEventListener("click", (event) => { if (event.target === el.panel) el.panel.close(); });
addEventListener("popstate", () => { if (document.body.classList.contains("reading")) leaveReader(); });
addEventListener("hashchange", () => { if (location.hash) begin().catch(() => {}); });

if (!narrow()) el.query.focus();
begin().catch((error) => { if (error instanceof Refused && error.status !== 401) tell(error.message); });
