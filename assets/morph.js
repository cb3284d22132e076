// Makes a node that is shown equal to a new one while touching only what differs: a growing paragraph gets its new words,
// not new nodes, so that the browser lays out its end alone and a selection in it stays.

/** Change `old` into `fresh`; returns the node that now stands there. */
export function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return old;
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.data.length));
    else old.data = fresh.data;
    return old;
  }
  if (!isAlike(old, fresh)) {
    old.replaceWith(fresh);
    return fresh;
  }
  const children = [...fresh.childNodes];
  children.forEach((child, index) => {
    const there = old.childNodes[index];
    if (there) morph(there, child);
    else old.append(child);
  });
  while (old.childNodes.length > children.length) old.lastChild.remove();
  return old;
}

/** The same tag with the same attributes, and nothing that was set by another hand. */
function isAlike(old, fresh) {
  return old.nodeName === fresh.nodeName && !old.classList?.contains("formula") &&
    old.attributes?.length === fresh.attributes?.length &&
    [...(old.attributes || [])].every((attribute) => fresh.getAttribute(attribute.name) === attribute.value);
}
