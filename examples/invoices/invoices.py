"""Orders joined with the table of customers: an invoice for each order.

An invoice has the tax of the customer's country. Customers are a compacted topic, keyed by customer. One who
moves pays the new country's tax from then on; earlier invoices stay as they are. Orders are keyed by order,
so they get the customer as their key first. An order of a customer whom nobody knows goes to a topic of its
own.

    fcluster up examples/invoices/invoices.py
"""

from fcluster import Job

job = Job("invoices")
orders = job.topic("orders")
customers = job.table(job.topic("customers"))
invoices = job.topic("invoices")
unknown = job.topic("orders-unknown")

TAX_PERCENT = {"DE": 19, "FR": 20, "IT": 22}


def invoice(order, customer):
    """The invoice for an order. A customer who isn't known has none."""
    if customer is None:
        return order
    net = order["cents"]
    return {
        "order": order["id"],
        "customer": order["customer"],
        "name": customer["name"],
        "cents": net + net * TAX_PERCENT[customer["country"]] // 100,
    }


joined = job.stream(orders).key_by("customer").join(customers, invoice, how="left")
joined.filter(lambda value: "name" in value).to(invoices)
joined.filter(lambda value: "name" not in value).to(unknown)
