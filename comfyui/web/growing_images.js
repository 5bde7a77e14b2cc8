// KOSMOS-G Encode shows one image socket more than are connected, up to those that its node has.
import { app } from "../../scripts/app.js";

const NODE = "KosmosGEncode";
const isImage = (input) => /^image\d+$/.test(input.name);

function fitSockets(node, max) {
  const images = node.inputs.filter(isImage);
  const lastUsed = images.findLastIndex((input) => input.link != null);
  const wanted = Math.min(lastUsed + 2, max);
  for (let i = images.length; i > wanted; i--) {
    node.removeInput(node.inputs.findIndex((input) => input.name === `image${i}`));
  }
  for (let i = images.length + 1; i <= wanted; i++) {
    node.addInput(`image${i}`, "IMAGE");
  }
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

app.registerExtension({
  name: "kosmosg.growing-images",
  async beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const max = Object.keys(nodeData.input?.optional ?? {}).length;

    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...given) {
      created?.apply(this, given);
      fitSockets(this, max);
    };
    // Links of a loaded workflow are there only after its nodes.
    const configured = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function (...given) {
      configured?.apply(this, given);
      queueMicrotask(() => fitSockets(this, max));
    };
    const connected = nodeType.prototype.onConnectionsChange;
    nodeType.prototype.onConnectionsChange = function (...given) {
      connected?.apply(this, given);
      if (!app.configuringGraph) fitSockets(this, max);
    };
  },
});
