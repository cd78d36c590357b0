// The page of an order: asks how it stands until the worker has called the app back.

const order = document.getElementById("order");

async function look() {
  try {
    const response = await fetch(order.dataset.state, { headers: { Accept: "application/json" } });
    const { state, short_result } = await response.json();
    document.getElementById("state").textContent = state;
    document.getElementById("state").className = `state ${state}`;
    document.getElementById("short").textContent = short_result ?? "";
    if (state !== "processing") return;
  } catch {
    // It is asked again.
  }
  setTimeout(look, 500);
}

look();
