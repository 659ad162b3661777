"use strict";
// What models wrote reaches the page as text nodes only: no markup is ever parsed out of data.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);

function make(tag, name, ...content) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...content.filter(item => item !== null && item !== undefined));
  return element;
}

function button(name, text, onClick) {
  const element = make("button", name, text);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}

function fill(select, choices) {
  for (const [value, label] of choices) {
    const option = make("option", "", label);
    option.value = value;
    select.append(option);
  }
  select.hidden = choices.length < 2;
}

const number = value => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const wrong = rollout => rollout.accuracy !== null && rollout.accuracy < 0.5;
const isCut = rollout => rollout.finish_reason === "length";
const verdict = rollout => (rollout.verdict ? rollout.verdict.consistency : null);

// ---- completions ----------------------------------------------------------------------------------------------------

const TAG = /^<\/?(?:think|answer)>$/;

// Texts in a row as a paragraph that shows its tags, thinking and answer; those that are marked in elements `tag`.
function paragraph(list, marks, tag) {
  const body = make("p", "text");
  body.dir = "auto";
  let inside = "";
  for (let from = 0, to; from < list.length; from = to) {
    const isTag = TAG.test(list[from]);
    if (isTag) inside = list[from][1] === "/" ? "" : list[from].slice(1, -1);
    to = from + 1;
    while (!isTag && to < list.length && marks[to] === marks[from] && !TAG.test(list[to])) to++;
    const span = make("span", isTag ? "tag" : inside, list.slice(from, to).join(""));
    body.append(marks[from] ? make(tag, "", span) : span);
  }
  return body;
}

function completion(text) {
  const body = paragraph(text.split(/(<\/?(?:think|answer)>)/).filter(Boolean), []);
  if (text.length < 900) return body;
  body.classList.add("clip");
  const more = button("link", "show all", () => {
    more.textContent = body.classList.toggle("clip") ? "show all" : "show less";
  });
  return make("div", "", body, more);
}

const badge = (tone, text) => make("span", `badge ${tone}`, text);

function verdictBadges(found) {
  if (!found) return [];
  const tones = {consistent: "good", inconsistent: "bad", unknown: "warn"};
  const badges = [];
  if (found.consistency) badges.push(badge(tones[found.consistency] || "", found.consistency));
  if (found.repetition > 0) badges.push(badge(found.repetition > 0.4 ? "bad" : "", `repetition ${Math.round(100 * found.repetition)}%`));
  if (found.think_tokens !== undefined) badges.push(badge("", `thinking ${number(found.think_tokens)} tokens`));
  return badges;
}

function verdictReason(found) {
  if (!found) return null;
  const parts = [];
  if (found.concluded_answer !== undefined) parts.push(`the thinking concludes: ${found.concluded_answer}`);
  if (found.reason !== undefined) parts.push(found.reason);
  if (found.judge !== undefined) parts.push(`judge: ${found.judge}`);
  return parts.length ? make("p", "reason", parts.join(" · ")) : null;
}

function accuracyTone(value) {
  return value >= 0.999 ? "good" : value < 0.5 ? "bad" : "warn";
}

// A policy often says the same again: equal completions of a stage are shown once, with their number.
function folded(rollouts) {
  const groups = new Map();
  for (const rollout of rollouts) {
    const key = `${rollout.stage}\n${rollout.completion}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(rollout);
  }
  return [...groups.values()];
}

function rolloutView([rollout, ...others]) {
  const badges = others.length ? [badge("", `× ${number(others.length + 1)}`)] : [];
  if (rollout.accuracy !== null) badges.push(badge(accuracyTone(rollout.accuracy), `accuracy ${rollout.accuracy}`));
  for (const [name, value] of Object.entries(rollout.rewards)) {
    if (!name.startsWith("accuracy") || value !== rollout.accuracy) badges.push(badge("", `${name} ${value}`));
  }
  badges.push(...verdictBadges(rollout.verdict));
  if (isCut(rollout)) badges.push(badge("warn", "cut at the longest length"));
  badges.push(badge("", plural(rollout.completion_tokens, "token")));
  if (rollout.advantage !== null) badges.push(badge("", `advantage ${rollout.advantage < 0 ? "−" : "+"}${Math.abs(rollout.advantage).toFixed(2)}`));
  const place = `${data.stages[rollout.stage]}, step ${rollout.step}`;
  const view = make("article", "rollout", make("div", "badges", ...badges, make("span", "", place)), completion(rollout.completion), verdictReason(rollout.verdict));
  view.title = [rollout, ...others].map(item => item.rollout_id).join(", ");
  return view;
}

// ---- questions ------------------------------------------------------------------------------------------------------

function options(item) {
  const letters = item.problem_type === "multiple choice" ? item.solution.split(",").map(letter => letter.trim()) : [];
  const list = make("ul", "options");
  let marked = false;
  for (const option of item.options) {
    const right = letters.includes(option.slice(0, 1)) && !/^\w{2}/.test(option);
    marked = marked || right;
    list.append(make("li", right ? "right" : "", option));
  }
  return [item.options.length ? list : null, marked ? null : make("div", "solution", `Solution: ${item.solution}`)];
}

const media = new Map(Object.entries(data.media)); // a file may be called "constructor"

function film(name) {
  const found = media.get(name);
  if (!found) return make("p", "film", `${name}: drawn without its frames`);
  const strip = make("div", "strip");
  strip.tabIndex = 0;
  found.frames.forEach((source, place) => {
    const image = make("img");
    image.alt = found.times.length ? `frame at ${found.times[place]} s` : name;
    image.addEventListener("load", () => { if (image.naturalHeight < 84) image.classList.add("coarse"); });
    image.src = source;
    strip.append(make("figure", "", image, found.times.length ? make("figcaption", "", `${found.times[place]} s`) : null));
  });
  const note = make("p", "film", found.frames.length ? `${name}: ${found.note}` : `${name}: not shown, ${found.note}`);
  return make("div", "", found.frames.length ? strip : null, note);
}

function questionView({question, rollouts}) {
  const files = [...question.videos, ...question.images];
  const list = make("div", "rollouts");
  const shown = 4, groups = folded(rollouts);
  list.append(...groups.slice(0, shown).map(rolloutView));
  const of = question.total > question.rollouts.length ? ` (${number(question.total)} in the run)` : "";
  const matched = `${number(rollouts.length)} of ${plural(question.rollouts.length, "rollout")}${of}`;
  const card = make("article", "question",
    make("div", "meta", make("span", "", question.question_id), badge("", question.problem_type), badge("", question.data_source), make("span", "", matched)),
    make("p", "problem", question.problem), ...options(question), ...files.map(film), list);
  if (groups.length > shown) {
    const more = button("", `Show ${number(groups.length - shown)} more`, () => {
      list.append(...groups.slice(shown).map(rolloutView));
      more.remove();
    });
    card.append(more);
  }
  return card;
}

const lower = item => (item.lower ??= [item.question_id, item.problem, ...item.options, item.data_source, item.solution].join("\n").toLowerCase());
const lowerText = rollout => (rollout.lower ??= `${rollout.rollout_id}\n${rollout.completion}`.toLowerCase());

const shows = {
  all: () => true,
  wrong,
  right: rollout => rollout.accuracy !== null && rollout.accuracy >= 0.999,
  inconsistent: rollout => verdict(rollout) === "inconsistent",
  "right but inconsistent": rollout => verdict(rollout) === "inconsistent" && !wrong(rollout),
  unknown: rollout => verdict(rollout) === "unknown",
  cut: isCut,
};

function chosenQuestions() {
  const text = at("q-text").value.trim().toLowerCase();
  const show = shows[at("q-show").value], kind = at("q-kind").value, stage = at("q-stage").value, sort = at("q-sort").value;
  const found = [];
  for (const question of data.questions) {
    if (kind && question.problem_type !== kind) continue;
    const inQuestion = !text || lower(question).includes(text);
    const rollouts = question.rollouts.filter(rollout =>
      show(rollout) && (stage === "" || rollout.stage === Number(stage)) && (inQuestion || lowerText(rollout).includes(text)));
    if (rollouts.length) found.push({question, rollouts});
  }
  const mean = rollouts => { // of the known accuracies; where there is none, more than any, so that it comes last
    const known = rollouts.filter(rollout => rollout.accuracy !== null);
    return known.length ? known.reduce((sum, rollout) => sum + rollout.accuracy, 0) / known.length : 2;
  };
  if (sort === "longest" || sort === "shortest") {
    const sign = sort === "longest" ? 1 : -1;
    for (const item of found) item.rollouts.sort((a, b) => sign * (b.completion_tokens - a.completion_tokens));
    found.sort((a, b) => b.rollouts[0].completion_tokens * sign - a.rollouts[0].completion_tokens * sign);
  } else if (sort === "hardest") {
    found.sort((a, b) => mean(a.question.rollouts) - mean(b.question.rollouts));
  } else if (sort === "mixed") {
    found.sort((a, b) => Math.abs(mean(a.question.rollouts) - 0.5) - Math.abs(mean(b.question.rollouts) - 0.5));
  }
  return found;
}

// ---- pairs ----------------------------------------------------------------------------------------------------------

const words = text => text.match(/<\/?(?:think|answer)>|[^\s<]+|<|\s+/g) || [];
const MAX_CELLS = 4e6;

// For each word of both sides, whether the other side lacks it: the longest common subsequence, ends trimmed first.
function differences(left, right) {
  const marks = [new Array(left.length).fill(false), new Array(right.length).fill(false)];
  let start = 0, endLeft = left.length, endRight = right.length;
  while (start < endLeft && start < endRight && left[start] === right[start]) start++;
  while (endLeft > start && endRight > start && left[endLeft - 1] === right[endRight - 1]) { endLeft--; endRight--; }
  const rows = endLeft - start, columns = endRight - start;
  if (rows * columns > MAX_CELLS) {
    marks[0].fill(true, start, endLeft);
    marks[1].fill(true, start, endRight);
    return marks;
  }
  const width = columns + 1, table = new Uint32Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      table[i * width + j] = left[start + i] === right[start + j]
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && left[start + i] === right[start + j]) { i++; j++; }
    else if (j >= columns || (i < rows && table[(i + 1) * width + j] >= table[i * width + j + 1])) marks[0][start + i++] = true;
    else marks[1][start + j++] = true;
  }
  return marks;
}

function side(name, title, list, marks, tag, verdicts, ids, fault) {
  const found = verdicts.filter(Boolean);
  const badges = fault ? [badge("bad", `rejected as ${fault}`)] : [];
  badges.push(...found.flatMap(item => [
    item.accuracy === undefined ? null : badge(accuracyTone(item.accuracy), `accuracy ${item.accuracy}`), ...verdictBadges(item)]));
  const view = make("section", `side ${name}`, make("h4", "", title), make("div", "badges", ...badges), paragraph(list, marks, tag),
    ...found.map(verdictReason));
  view.title = ids.join(" + ");
  return view;
}

function pairView(pair) {
  const left = words(pair.chosen), right = words(pair.rejected);
  const marks = differences(left, right);
  const meta = make("div", "meta", make("span", "", pair.question_id), badge("", pair.kind), make("span", "", data.stages[pair.stage]));
  if (data.questions.some(question => question.question_id === pair.question_id)) {
    meta.append(button("link", "its rollouts", () => {
      for (const id of ["q-show", "q-kind", "q-stage", "q-sort"]) at(id).selectedIndex = 0;
      at("q-text").value = pair.question_id;
      lists.questions.update();
      at("questions").scrollIntoView();
    }));
  }
  return make("article", "pair", meta, make("p", "problem", pair.problem), ...options(pair),
    make("div", "sides",
      side("chosen", "Chosen", left, marks[0], "ins", pair.chosen_verdicts, pair.chosen_ids),
      side("rejected", "Rejected", right, marks[1], "del", [pair.rejected_verdict], [pair.rejected_id], pair.fault)));
}

// A long text has its own scroll bar; it begins at the first difference.
function showDifference(body) {
  const first = body.querySelector("ins, del");
  if (body.scrollHeight <= body.clientHeight) return;
  body.tabIndex = 0;
  if (first) body.scrollTop = first.offsetTop - 60;
}

function chosenPairs() {
  const text = at("p-text").value.trim().toLowerCase(), kind = at("p-kind").value;
  const found = data.pairs.filter(pair => (!kind || pair.kind === kind) &&
    (!text || [pair.question_id, pair.problem, ...pair.options, pair.solution, pair.chosen, pair.rejected].join("\n").toLowerCase().includes(text)));
  if (at("p-sort").value === "longest") found.sort((a, b) => b.chosen.length - a.chosen.length);
  return found;
}

// ---- lists, filters, pages ------------------------------------------------------------------------------------------

function paged(prefix, perPage, choose, view, describe) {
  const list = {page: 0, items: []};
  list.update = () => { list.items = choose(); list.page = 0; list.draw(); };
  list.turn = change => {
    const last = Math.max(0, Math.ceil(list.items.length / perPage) - 1);
    const page = Math.min(last, Math.max(0, list.page + change));
    if (page === list.page) return;
    list.page = page;
    list.draw();
    at(`${prefix}-filters`).scrollIntoView();
  };
  list.draw = () => {
    const from = list.page * perPage, to = Math.min(from + perPage, list.items.length);
    at(`${prefix}-count`).textContent = describe(list.items);
    at(`${prefix}-list`).replaceChildren(...list.items.slice(from, to).map(view));
    at(`${prefix}-list`).querySelectorAll(".side .text").forEach(showDifference);
    const back = button("", "Previous", () => list.turn(-1)), next = button("", "Next", () => list.turn(1));
    back.disabled = from === 0;
    next.disabled = to >= list.items.length;
    at(`${prefix}-pager`).replaceChildren(...(list.items.length > perPage ? [back, `${number(from + 1)} to ${number(to)} of ${number(list.items.length)}`, next] : []));
  };
  const form = at(`${prefix}-filters`);
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(list.update, 120); });
  form.addEventListener("submit", event => { event.preventDefault(); list.update(); });
  return list;
}

const kindsOf = (items, key) => [...new Set(items.map(item => item[key]))].sort().map(kind => [kind, kind]);
const rollouts = data.questions.flatMap(question => question.rollouts);
const offered = Object.entries({
  all: "All rollouts", wrong: "Wrong (accuracy under 0.5)", right: "Right", inconsistent: "Inconsistent",
  "right but inconsistent": "Right but inconsistent", unknown: "Consistency unknown", cut: "Cut at the longest length",
}).filter(([name]) => name === "all" || rollouts.some(shows[name]));
const stagesSeen = [...new Set(rollouts.map(rollout => rollout.stage))].sort((a, b) => a - b);
fill(at("q-show"), offered);
fill(at("q-kind"), [["", "All question types"], ...kindsOf(data.questions, "problem_type")]);
fill(at("q-stage"), [["", "All stages"], ...stagesSeen.map(place => [String(place), data.stages[place]])]);
fill(at("q-sort"), [["", "As drawn"], ["longest", "Longest first"], ["shortest", "Shortest first"], ["hardest", "Lowest accuracy first"], ["mixed", "Most divided first"]]);
fill(at("p-kind"), [["", "All kinds"], ...kindsOf(data.pairs, "kind")]);
fill(at("p-sort"), [["", "As drawn"], ["longest", "Longest first"]]);

const lists = {
  questions: paged("q", 10, chosenQuestions, questionView, items =>
    `${plural(items.length, "question")}, ${plural(items.reduce((sum, item) => sum + item.rollouts.length, 0), "rollout")} match`),
  pairs: paged("p", 5, chosenPairs, pairView, items => `${plural(items.length, "pair")} match`),
};
at("q-filters").hidden = !data.questions.length;
at("p-filters").hidden = !data.pairs.length;
if (data.questions.length) lists.questions.update();
if (data.pairs.length) lists.pairs.update();

let used = lists.questions;
at("questions").addEventListener("focusin", () => { used = lists.questions; });
at("pairs").addEventListener("focusin", () => { used = lists.pairs; });
at("questions").addEventListener("pointerdown", () => { used = lists.questions; });
at("pairs").addEventListener("pointerdown", () => { used = lists.pairs; });
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(?:INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "/") { event.preventDefault(); at(used === lists.pairs ? "p-text" : "q-text").focus(); }
  if (event.key === "n") used.turn(1);
  if (event.key === "p") used.turn(-1);
});

// A table that is cut at the side says so.
function hint() {
  for (const box of document.querySelectorAll(".scroll")) {
    box.previousElementSibling.classList.toggle("shown", box.scrollWidth > box.clientWidth);
  }
}
addEventListener("resize", hint);
hint();
