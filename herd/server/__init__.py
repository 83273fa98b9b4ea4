"""One HTTP process that imports no torch, and one worker process for each loaded model.

    app.py         create_app(settings) -> FastAPI: routers, lifespan, graceful drain
    state.py       State: what every router gets as `request.app.state.herd`; `State.run` is the one way from a Call to events
    protocol.py    what goes between the two kinds of processes; wire.py: how it is written (JSON, never pickle)
    worker.py      the process of one model; prepare.py: from a Call to a request of the engine
    process.py     the HTTP side of one worker; models.py: which models there are, and which are loaded
    batches.py     requests in a file: they are kept by batchstore.py, their lines read and written by batchlines.py
    door.py        who is let in when; pictures.py and fetching.py: images of requests, and the addresses that they may come from
    downloads.py   models that clients want to have here
    providers/     models of other servers: requests that are handed on
    fields.py      strict request models; jsonbody.py: strict JSON; errors.py: HerdErrors and statuses; sse.py: event streams

How a router is added: write a module with `router = APIRouter()`, let its endpoint read its body with `fields.parse(request,
Model)` (an unknown field is then a 400 that names it), make a `protocol.Call`, and take the events of `state.run(model, call)`:

    @router.post("/v1/mine", openapi_extra=body_of(Mine))
    async def mine(request: Request) -> Response:
        state = state_of(request)
        body = await parse(request, Mine)
        events = state.run(body.model, Call(...))
        ...

and name it in `app.ROUTERS`. Errors are raised (`ApiError`, or any HerdError); the app gives them the shape that the path asks
for. `openai/chat.py` shows all of it: streams, clients that go away, errors on the way.
"""
